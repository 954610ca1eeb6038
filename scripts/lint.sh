#!/usr/bin/env bash
# ruff, its formatter and mypy; the first that complains ends it.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
"$root/scripts/setup.sh" dev
cd -- "$root"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
