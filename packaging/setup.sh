#!/bin/bash
# Installs what building and testing the packages needs and is missing (Debian, Ubuntu). Does nothing twice.
set -euo pipefail
TOOLS="dpkg-dev rpm binutils gzip gpg lintian rpmlint reprepro createrepo-c man-db mmdebstrap systemd-container iproute2 dnsmasq-base vagrant"
missing=()
for p in $TOOLS; do dpkg-query -W -f='${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing+=("$p"); done
[ "${#missing[@]}" -gt 0 ] || exit 0
echo "packaging: installing ${missing[*]}"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
as_root sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"' sh "${missing[@]}" >/dev/null
