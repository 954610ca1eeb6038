# Sourced by the other scripts: the repository's root, and the virtual environment as an absolute path.
# shellcheck shell=bash
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$root/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
export VENV
