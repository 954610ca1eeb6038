#!/usr/bin/env bash
# Lint, then the tests; the arguments go to pytest. Plain `scripts/test.sh` runs what needs no accelerator, no
# server and little time (pyproject.toml, addopts); `scripts/test.sh -m slow` runs the tests with that mark.
#
#   EXTRAS   what setup.sh installs    default: dev
#   LINT=0   tests only
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
"$root/scripts/setup.sh" "${EXTRAS:-dev}"
cd -- "$root"
[ "${LINT:-1}" = 0 ] || scripts/lint.sh

# Nothing is downloaded or uploaded, and the two workers do not fight over the cores. A file's tests share what it set
# up, so one worker has them all (xdist's own groups have no effect under pytest 9.2). Files come in their own order,
# the unit tests last: xdist would begin with those of the most tests, and end with one worker alone in a long file.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
status=0
"$VENV/bin/python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
if [ "$status" = 5 ]; then
    echo "test: no test was chosen by: pytest $*" >&2
fi
exit "$status"
