#!/bin/sh
# The mounts of one host, in a mount namespace of its own (TOP: an empty folder for its tmpfs, NAME: its name).
set -eu
mount -t tmpfs -o mode=0755 tombolo-host "$TOP"
for d in etc var/lib var/log; do
  mkdir -p "$TOP/up/$d" "$TOP/work/$d"
  mount -t overlay overlay -o "lowerdir=/$d,upperdir=$TOP/up/$d,workdir=$TOP/work/$d" "/$d"
done
mount -t tmpfs -o mode=0755 tombolo-run /run
mount -t sysfs sysfs /sys
# Not sticky: what a killed process has left (libfaketime names its semaphores by pid) is in nobody's way.
mount -t tmpfs -o mode=0777 tombolo-shm /dev/shm
mkdir -p /etc/tombolo /run/tombolo /var/lib/tombolo /var/log/tombolo /run/lock
printf 'hosts: files dns\npasswd: files\ngroup: files\n' > /etc/nsswitch.conf
rm -f /etc/resolv.conf; printf 'nameserver 127.0.0.1\noptions timeout:2 attempts:1\n' > /etc/resolv.conf
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost\n' > /etc/hosts
echo "$NAME" > /etc/hostname
n=64400
for u in tombolo-agent tombolo-netd tombolo-discovery tombolo-gateway; do
  grep -q "^$u:" /etc/passwd || { echo "$u:x:$n:$n::/nonexistent:/usr/sbin/nologin" >> /etc/passwd; echo "$u:x:$n:" >> /etc/group; }
  n=$((n+1))
done
grep -q '^tombolo-admin:' /etc/group || echo "tombolo-admin:x:$n:" >> /etc/group
hostname "$NAME"
echo ready
exec sleep 1000000000
