#!/usr/bin/env bash
# `make bench`: direct, Tombolo, Envoy (both shapes) and, where TOMBOLO_ZTUNNEL names one, ztunnel, on the same two-host
# topology in one run; one worker per proxy; medians of ROUNDS (5) rounds. Writes benches/results/<date>.md and .jsonl.
set -euo pipefail
cd "$(dirname "$0")"
export BIN_DIR=${BIN_DIR:-$PWD/../target/release}
export ENVOY_BIN=${TOMBOLO_ENVOY:-$PWD/../target/envoy/envoy}
SYSTEMS=${SYSTEMS:-direct,tombolo}
[ -x "$ENVOY_BIN" ] && [ -z "${ONLY_OURS:-}" ] && SYSTEMS=$SYSTEMS,envoy-hbone,envoy-mtls
if [ -n "${TOMBOLO_ZTUNNEL:-}" ]; then export ZTUNNEL_BIN=$TOMBOLO_ZTUNNEL; SYSTEMS=$SYSTEMS,ztunnel; fi
TESTS=${TESTS:-idle,iperf1,iperf1r,wrk1,wrk32,crr1,crr32,hold5000}
OUT=${OUT:-../target/bench}; rm -rf "$OUT"; mkdir -p "$OUT"
setsid -w ./run.py --out "$OUT" --systems "$SYSTEMS" --rounds "${ROUNDS:-5}" --secs "${SECS:-3}" --pin host --tests "$TESTS" ${PERF:+--perf "$PERF"}
name=results/$(date +%Y-%m-%d)${LABEL:+-$LABEL}
{
  echo "# Data plane, $(date +%Y-%m-%d)"
  echo
  echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown); $(nproc) CPUs, $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1), $(free -g | awk '/Mem/{print $2}') GiB, kernel $(uname -r); one worker per proxy, ${ROUNDS:-5} rounds of ${SECS:-3} s, pinned one CPU per host."
  [ -x "$ENVOY_BIN" ] && echo "Envoy: $("$ENVOY_BIN" --version 2>/dev/null | grep -o '[0-9]*\.[0-9]*\.[0-9]*' | head -1)."
  [ -n "${ZTUNNEL_BIN:-}" ] && echo "ztunnel: $("$ZTUNNEL_BIN" version 2>/dev/null | head -1)."
  echo "Columns: px_* both proxies together, all_* with client and server; noise: cores kept busy by anything else (softirq included)."
  ./summary.py "$OUT/results.jsonl"
} > "$name.md"
cp "$OUT/results.jsonl" "$name.jsonl"
echo "written: benches/$name.md"
