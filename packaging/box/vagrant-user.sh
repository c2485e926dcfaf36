#!/bin/sh
# Called by build.sh: the user that Vagrant logs in as, with its well-known key. Such an image is for tests: whoever can
# reach its ssh server is root. $1 is the root of the tree.
set -eu
root=$1
chroot "$root" useradd --create-home --shell /bin/bash vagrant
mkdir -m 0700 "$root/home/vagrant/.ssh"
cat > "$root/home/vagrant/.ssh/authorized_keys" <<'K'
ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v1I2YJ6oXevct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure public key
K
chmod 0600 "$root/home/vagrant/.ssh/authorized_keys"
chroot "$root" chown -R vagrant:vagrant /home/vagrant/.ssh
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/vagrant"
chmod 0440 "$root/etc/sudoers.d/vagrant"
echo vagrant > "$root/etc/hostname"
# Vagrant does what cloud-init would.
touch "$root/etc/cloud/cloud-init.disabled"
# cloud-init would make them.
cat > "$root/etc/systemd/system/ssh-host-keys.service" <<'U'
[Unit]
Description=Host keys of the ssh server
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
Before=ssh.service
[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A
[Install]
WantedBy=multi-user.target
U
chroot "$root" systemctl enable -q ssh-host-keys.service
