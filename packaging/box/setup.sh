#!/bin/bash
# Installs what building images and running them needs and is missing (Debian, Ubuntu). Does nothing twice.
#   packaging/box/setup.sh             the builder and an emulator
#   packaging/box/setup.sh --vagrant   Vagrant with libvirt besides
set -euo pipefail
TOOLS="mmdebstrap qemu-system-x86 qemu-utils seabios e2fsprogs fdisk grub-common grub-pc-bin openssh-client genisoimage iproute2 openssl python3"
[ "${1:-}" != --vagrant ] || TOOLS+=" vagrant vagrant-libvirt libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu rsync dnsmasq-base iptables"
missing=()
for p in $TOOLS; do dpkg-query -W -f='${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing+=("$p"); done
[ "${#missing[@]}" -gt 0 ] || exit 0
echo "box: installing ${missing[*]}"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
as_root sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$@"' sh "${missing[@]}" >/dev/null
