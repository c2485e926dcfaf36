#!/usr/bin/env bash
# Tombolo as a user has it: discovery on the router, one agent per host, enrolled with tokens. env: BIN_DIR, THREADS, CPUA/CPUB
set -euo pipefail
HERE=$(cd "$(dirname "$0")/../.." && pwd)
BIN=${BIN_DIR:-$HERE/target/release}; D=$WORK/tombolo; NSR=${PFX}R
in_host() { # in_host NAME command…: network and mounts of that host
  local n=$1; shift
  nsenter -t "$(cat "$D/$n.holder")" -n -m -u -- env PATH="$BIN:$PATH" "$@"
}
background() { # the same, becoming the program: its pid is that of the job
  local n=$1; shift
  exec nsenter -t "$(cat "$D/$n.holder")" -n -m -u -- env PATH="$BIN:$PATH" "$@"
}
holder() { # holder NAME NETNS
  mkdir -p "$D/fs-$1"
  TOP=$D/fs-$1 NAME=$1 nsenter --net="/run/netns/$2" -- unshare --mount --uts --ipc --propagation private -- sh "$HERE/tests/testkit/host-setup.sh" >"$D/$1.log" 2>&1 &
  echo $! > "$D/$1.holder"
  for i in $(seq 200); do grep -q ready "$D/$1.log" && return; sleep .02; done; cat "$D/$1.log" >&2; return 1
}
case "$1" in
start)
  rm -rf "$D"; mkdir -p "$D"
  holder control "$NSR"; holder a "$NSA"; holder b "$NSB"
  in_host control tombolo-discovery init --trust-domain bench.example --advertise 10.1.0.1:15012 >/dev/null
  background control tombolo-discovery run >"$D/discovery.log" 2>&1 & echo $! > "$D/discovery.pid"
  for i in $(seq 200); do in_host control curl -sf -m 1 http://127.0.0.1:15021/healthz/ready >/dev/null && break; sleep .05; done
  in_host control tombolo workload-group create client -n bench --service-account client --port none=1 >/dev/null
  in_host control tombolo workload-group create server -n bench --service-account server \
    --port http=8080 --port raw=9000 --port iperf=5201 >/dev/null
  for h in a b; do
    [ $h = a ] && { g=client; cpu=${CPUA:-}; px=A; ns=$NSA; } || { g=server; cpu=${CPUB:-}; px=B; ns=$NSB; }
    in_host $h sh -c "echo 'workers: ${THREADS:-2}' > /etc/tombolo/agent.yaml"
    in_host control tombolo token create -n bench --workload-group $g | in_host $h tombolo up - >"$D/up-$h.log" 2>&1 || { cat "$D/up-$h.log" >&2; exit 1; }
    pid=""; for p in $(ip netns pids "$ns"); do case "$(readlink "/proc/$p/exe")" in */tombolo-agent*) pid=$p ;; esac; done
    [ -n "$cpu" ] && taskset -ap -c "$cpu" "$pid" >/dev/null
    renice -n "${NICE:-0}" "$pid" >/dev/null
    echo "$pid" > "$WORK/px$px.pid"
  done
  in_host control tombolo get se server -n bench -o json \
    | python3 -c 'import json,sys; print(next(a["value"] for a in json.load(sys.stdin)["status"]["addresses"] if ":" not in a["value"]))' > "$WORK/target" ;;
stop)
  for n in a b; do in_host $n tombolo leave --force >/dev/null 2>&1 || true; done
  for p in "$D"/discovery.pid "$D"/*.holder; do kill -9 "$(cat "$p")" 2>/dev/null || true; done ;;
esac
