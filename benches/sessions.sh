#!/bin/bash
# A gateway with thousands of reverse sessions. Writes benches/results/<date>-sessions.md. Needs root, for network
# namespaces. Arguments are those of the program: benches/sessions.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
program=${PROGRAM:-target/release/tombolo-bench-sessions}
[ -x "$program" ] || { echo "missing $program: make bench-sessions builds it" >&2; exit 1; }
case " $* " in *" --help "* | *" -h "*) exec "$program" --help ;; esac
out=benches/results/$(date -u +%F)-sessions.md
load() { cut -d' ' -f1-3 /proc/loadavg; }
before=$(load)
table=$("$program" "$@")
{
    echo "# Reverse sessions at a gateway, $(date -u +%F)"
    echo
    echo "- $(nproc) CPUs: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(free -g | awk '/Mem/{print $2}') GiB, kernel $(uname -r)"
    echo "- load of the machine before and after (1, 5, 15 minutes): $before; $(load)"
    echo "- commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), arguments: ${*:-none}${NOTE:+, $NOTE}"
    echo
    echo "$table"
} > "$out"
echo "written: $out"
