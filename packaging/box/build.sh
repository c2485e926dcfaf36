#!/bin/bash
# Builds a Debian image for virtual machines, offline but for the package mirror, without loop devices or a running VM.
#   packaging/box/build.sh image     a cloud image (cloud-init, no user, no key)          -> prints the path of a qcow2
#   packaging/box/build.sh box       a Vagrant box for libvirt (user vagrant, well-known key) -> prints the path of a .box
# Environment:
#   BOX_RELEASE   release of Debian (default bookworm)
#   BOX_OUT       folder of what is built (default target/box)
# Both come from one tree of packages, which is kept in BOX_OUT and made anew when the list or this script changes. They
# boot by BIOS from a virtio disk, with the kernel of the release; the file system grows with the disk.
set -euo pipefail
export LC_ALL=C TZ=UTC
umask 022
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$HERE/../.." && pwd)
OUT=${BOX_OUT:-${CARGO_TARGET_DIR:-$REPO/target}/box}
RELEASE=${BOX_RELEASE:-bookworm}
die() { echo "box: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die "making a tree of packages needs root"
for tool in mmdebstrap qemu-img mke2fs sfdisk grub-mkimage; do
  command -v "$tool" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || die "$tool is missing; run: packaging/box/setup.sh"
done
PATH=$PATH:/usr/sbin:/sbin

# A small server: what cloud images have, no documentation, no compiler. The last line is for tests and for Vagrant.
PACKAGES=linux-image-cloud-amd64,initramfs-tools,zstd,systemd,systemd-sysv,systemd-resolved,libnss-resolve,systemd-timesyncd
PACKAGES+=,dbus,udev,iproute2,openssh-server,sudo,ca-certificates,curl,nftables,cloud-init,cloud-guest-utils,netbase,kmod
PACKAGES+=,procps,iputils-ping,rsync,python3,gpgv,less
KEY=$( { echo "$RELEASE $PACKAGES"; cat "$HERE/build.sh" "$HERE/customize.sh" "$HERE/vagrant-user.sh" "$HERE/Vagrantfile"; } | sha256sum | cut -c1-12)
BASE=$OUT/$RELEASE-$KEY
# The disk's size inside; the file has only what is used.
DISK_MB=4096

make_tree() { # the packages, as a tar file: file systems are made from it, never from a folder that somebody may change
  [ -s "$BASE/root.tar" ] && return
  mkdir -p "$BASE"
  local work; work=$(mktemp -d "$BASE/new.XXXXXX")
  cat > "$work/modules" <<'M'
virtio_pci
virtio_blk
virtio_scsi
virtio_net
sd_mod
ext4
M
  # Only what a virtio disk needs is in the initrd: a quarter of the size, and seconds of every boot without KVM.
  mmdebstrap --quiet --variant=minbase --include="$PACKAGES" \
    --aptopt='Apt::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --extract-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"; echo MODULES=list > "$1/etc/initramfs-tools/conf.d/box"' \
    --customize-hook="cat '$work/modules' >> \"\$1/etc/initramfs-tools/modules\"" \
    --customize-hook='chroot "$1" update-initramfs -u -k all >/dev/null' \
    --customize-hook="'$HERE/customize.sh' \"\$1\"" \
    "$RELEASE" "$work/root.tar" >&2
  mv "$work/root.tar" "$BASE/root.tar"
  rm -rf "$work"
}

make_disk() { # make_disk ROOT DISK: a qcow2 with one bootable partition that has the tree
  local root=$1 disk=$2 raw=$2.raw fs=$2.fs
  # 1 MiB is left for the partition table and the boot loader.
  mke2fs -q -t ext4 -L root -d "$root" "$fs" "$((DISK_MB - 1))M"
  truncate -s "${DISK_MB}M" "$raw"
  echo 'label: dos
start=2048, type=83, bootable' | sfdisk -q "$raw"
  # GRUB, as its installer would write it: first sector, then the core image with what it needs to read the partition.
  cat > "$disk.cfg" <<'G'
set root=(hd0,msdos1)
linux /vmlinuz root=LABEL=root rw console=ttyS0 net.ifnames=0 quiet
initrd /initrd.img
boot
G
  grub-mkimage -O i386-pc -p /boot/grub -c "$disk.cfg" -o "$disk.core" biosdisk part_msdos ext2 linux normal echo
  dd if=/usr/lib/grub/i386-pc/boot.img of="$raw" bs=440 count=1 conv=notrunc status=none
  dd if="$disk.core" of="$raw" bs=512 seek=1 conv=notrunc status=none
  [ "$(stat -c %s "$disk.core")" -lt $((2047 * 512)) ] || die "the boot loader does not fit before the partition"
  dd if="$fs" of="$raw" bs=1M seek=1 conv=notrunc,sparse status=none
  qemu-img convert -q -O qcow2 -c "$raw" "$disk.part"
  rm -f "$raw" "$fs" "$disk.cfg" "$disk.core"
  mv "$disk.part" "$disk"
}

unpack() { # unpack FOLDER
  mkdir -p "$1"; tar -C "$1" --numeric-owner -xf "$BASE/root.tar" --exclude='./dev/*'
}

mkdir -p "$OUT"
exec 9>"$OUT/lock"; flock 9
make_tree
WORK=$(mktemp -d "$BASE/work.XXXXXX"); trap 'rm -rf "$WORK"' EXIT
case ${1:-} in
image)
  [ -s "$BASE/cloud.qcow2" ] || { unpack "$WORK/root"; make_disk "$WORK/root" "$WORK/cloud.qcow2"; mv "$WORK/cloud.qcow2" "$BASE/cloud.qcow2"; }
  echo "$BASE/cloud.qcow2" ;;
box)
  if [ ! -s "$BASE/tombolo.box" ]; then
    unpack "$WORK/root"
    "$HERE/vagrant-user.sh" "$WORK/root"
    make_disk "$WORK/root" "$WORK/box.img"
    printf '{"provider":"libvirt","format":"qcow2","virtual_size":%d}\n' "$((DISK_MB / 1024))" > "$WORK/metadata.json"
    cp "$HERE/Vagrantfile" "$WORK/Vagrantfile"
    # The image is compressed already.
    tar -C "$WORK" -c metadata.json Vagrantfile box.img | gzip -1 > "$WORK/tombolo.box"
    mv "$WORK/tombolo.box" "$BASE/tombolo.box"
  fi
  echo "$BASE/tombolo.box" ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
