#!/usr/bin/env bash
# From a fresh checkout to a trained, measured and exported head: installs what that needs (setup.sh), then runs
# `draftsmith quickstart` with the arguments given here. Results land in the current folder, under runs/.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
"$root/scripts/setup.sh"
exec "$VENV/bin/draftsmith" quickstart "$@"
