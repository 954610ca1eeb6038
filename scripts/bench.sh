#!/usr/bin/env bash
# The published table of docs/benchmarks.md, and which ratios moved since they were recorded in docs/benchmarks.json.
# The arguments go to draftsmith bench: `scripts/bench.sh record=true` records them anew, `repeats=1` is quick.
# Then our EAGLE-3 step beside that of speculators, in an environment of its own (PEER=0 leaves that out).
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
"$root/scripts/setup.sh" dev
cd -- "$root"
OMP_NUM_THREADS=1 "$VENV/bin/draftsmith" bench figures=all repeats=5 against=docs/benchmarks.json "$@"
[ "${PEER:-1}" = 0 ] || scripts/bench_speculators.sh
