#!/bin/sh
# The control plane: control.sh ADDRESS GROUP…  Makes the mesh once, and each group once.
set -eu
address=$1; shift
[ -e /etc/tombolo/discovery.yaml ] || tombolo-discovery init --trust-domain mesh.example --advertise "$address:15012"
systemctl enable --quiet --now tombolo-discovery
for group in "$@"; do
  tombolo get workloadgroup "$group" -n shop >/dev/null 2>&1 \
    || tombolo workload-group create "$group" -n shop --service-account "$group" --port http=80:8080
done
tombolo get workloadgroup -n shop
