#!/bin/bash
# The arm64 packages, by the same scripts, where this machine can make programs for it; else says SKIPPED and why.
#   packaging/arm64.sh [OUTPUT]      (default target/packages)
# Environment: as build.sh; TOMBOLO_ARM64_BIN_DIR is a folder of programs that were built elsewhere.
source "$(dirname "$0")/lib.sh"
OUT=${1:-$TARGET/packages}
TRIPLE=aarch64-unknown-linux-gnu
skip() { echo "SKIPPED arm64 packages: $*"; exit 0; }

BIN=${TOMBOLO_ARM64_BIN_DIR:-}
if [ -z "$BIN" ]; then
  command -v aarch64-linux-gnu-gcc >/dev/null || skip "no aarch64-linux-gnu-gcc (apt install gcc-aarch64-linux-gnu)"
  [ -d "$(rustc --print sysroot)/lib/rustlib/$TRIPLE" ] || skip "no Rust target (rustup target add $TRIPLE)"
  (cd "$REPO" && CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    cargo build --locked --release --target "$TRIPLE" -p tombolo -p tombolo-agent -p tombolo-netd -p tombolo-gateway -p tombolo-discovery)
  BIN=$TARGET/$TRIPLE/release
fi
[ -x "$BIN/tombolo" ] || die "no tombolo in $BIN"
command -v aarch64-linux-gnu-strip >/dev/null || [ "$(uname -m)" = aarch64 ] \
  || skip "no aarch64-linux-gnu-strip (apt install binutils-aarch64-linux-gnu)"
# Completions are made by a program that runs here.
TOMBOLO_BIN_DIR=$BIN TOMBOLO_CLI=${TOMBOLO_CLI:-$TARGET/release/tombolo} exec "$PACKAGING/build.sh" "$OUT"
