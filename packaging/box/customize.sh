#!/bin/sh
# Called by build.sh inside mmdebstrap: settings that every image of ours has. $1 is the root of the tree.
set -eu
root=$1
# Which machine it is, is decided at the first boot.
rm -f "$root/etc/hostname" "$root/etc/ssh/"ssh_host_*
: > "$root/etc/machine-id"
rm -f "$root/etc/resolv.conf"
ln -s ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
chroot "$root" systemctl enable -q systemd-networkd systemd-resolved ssh
# Where nobody else configures the first card. cloud-init and Vagrant write files that come before this one.
cat > "$root/etc/systemd/network/90-dhcp.network" <<'N'
[Match]
Name=eth0
[Network]
DHCP=yes
N
# Name lookups of the client's address, which nobody answers, would delay every login.
echo 'UseDNS no' > "$root/etc/ssh/sshd_config.d/box.conf"
mkdir -p "$root/etc/cloud/cloud.cfg.d"
cat > "$root/etc/cloud/cloud.cfg.d/90-box.cfg" <<'C'
system_info:
  network:
    renderers: [networkd]
# The image has C.UTF-8 and no generator of others.
locale: "false"
C
rm -rf "$root/var/lib/apt/lists/"* "$root/var/cache/apt/"*.bin "$root/usr/share/locale"
