#!/bin/bash
# The transports between networks over an emulated long way. Writes benches/results/<date>-wan.md. Needs root, for network
# namespaces. Arguments are those of the program: benches/wan.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
program=target/release/tombolo-bench-wan
[ -x "$program" ] || { echo "missing $program: make bench-wan builds it" >&2; exit 1; }
case " $* " in *" --help "* | *" -h "*) exec "$program" --help ;; esac
out=benches/results/$(date -u +%F)-wan.md
load() { cut -d' ' -f1-3 /proc/loadavg; }
before=$(load)
table=$("$program" "$@" 2> >(tee "$out.runs" >&2))
{
    echo "# Between networks, $(date -u +%F)"
    echo
    echo "- $(nproc) CPUs: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), kernel $(uname -r), net.core.rmem_max $(cat /proc/sys/net/core/rmem_max)"
    echo "- load of the machine before and after (1, 5, 15 minutes): $before; $(load)"
    echo "- commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), arguments: ${*:-none}"
    echo
    echo "$table"
    echo
    echo "Each run (round, test):"
    echo '```'
    cat "$out.runs"
    echo '```'
} > "$out"
rm -f "$out.runs"
echo "written: $out"
