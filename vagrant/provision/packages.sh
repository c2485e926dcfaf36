#!/bin/sh
# Installs packages of ours from /srv/packages: packages.sh NAME…  Does nothing if these very files are installed.
set -eu
export DEBIAN_FRONTEND=noninteractive
architecture=$(dpkg --print-architecture)
files=
for name in "$@"; do
  file=$(ls /srv/packages/"${name}"_*_"$architecture".deb 2>/dev/null | sort -V | tail -1)
  [ -n "$file" ] || { echo "no package $name for $architecture in the folder of packages; run on your machine: make packages" >&2; exit 1; }
  files="$files $file"
done
# shellcheck disable=SC2086  # a list of files without spaces
sum=$(sha256sum $files)
mark=/var/lib/tombolo-vagrant-packages
if [ "$(cat "$mark" 2>/dev/null)" = "$sum" ]; then echo "installed already: $*"; exit 0; fi

# Mesh names need a resolver that can send one domain elsewhere. Images without one have a plain resolv.conf.
if ! systemctl is-active --quiet systemd-resolved; then
  servers=$(awk '$1 == "nameserver" {print $2}' /etc/resolv.conf | tr '\n' ' ')
  apt-get update -qq
  # What has written resolv.conf so far may not find the new resolver: it is told the same servers.
  mkdir -p /etc/systemd/resolved.conf.d
  printf '[Resolve]\nDNS=%s\n' "$servers" > /etc/systemd/resolved.conf.d/vagrant.conf
  apt-get install -y -qq systemd-resolved libnss-resolve >/dev/null
  systemctl enable --quiet --now systemd-resolved
  systemctl restart systemd-resolved
fi

# A build of the same version replaces the one before.
again=
[ ! -e "$mark" ] || again=--reinstall
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 $again --allow-downgrades $files >/dev/null
echo "$sum" > "$mark"
dpkg-query -W -f '${Package} ${Version}\n' "$@"
