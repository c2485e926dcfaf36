#!/bin/bash
# Runs every fuzz target under libFuzzer for SECS seconds each (default 60), or the targets that are named, and keeps
# what they find in fuzz/artifacts. With a stable toolchain the sanitizer flags need RUSTC_BOOTSTRAP.
set -euo pipefail
cd "$(dirname "$0")"
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
export RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0
targets=("$@")
[ "${#targets[@]}" -gt 0 ] || mapfile -t targets < <(sed -n 's/^path = "fuzz_targets\/\(.*\)\.rs"$/\1/p' Cargo.toml)
cargo fuzz build --fuzz-dir .
failed=()
for target in "${targets[@]}"; do
  # New inputs go to a folder of their own: what is worth keeping is minimised into corpus/ by hand.
  mkdir -p "target/found/$target"
  cargo fuzz run --fuzz-dir . "$target" "target/found/$target" "corpus/$target" -- \
    -max_total_time="${SECS:-60}" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 2>&1 \
    | tee "target/$target.log" | grep -E '^stat::(number_of_executed_units|peak_rss_mb)|DONE|SUMMARY|panicked' || true
  [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$target")
done
[ "${#failed[@]}" = 0 ] || { echo "fuzz: findings in ${failed[*]}: fuzz/artifacts, fuzz/target/*.log" >&2; exit 1; }
echo "fuzz: ${#targets[@]} targets, ${SECS:-60} s each, no finding"
