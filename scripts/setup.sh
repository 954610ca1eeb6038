#!/usr/bin/env bash
# scripts/setup.sh [extra …]: a virtual environment with draftsmith in it, editable. Extras as in pyproject.toml
# (dev, gpu, lora, hub, plots, wandb, vllm). A second call does nothing until something that it depends on changes.
#
#   VENV         where                                        default: .venv beside pyproject.toml
#   PYTHON       which interpreter makes it                   default: the first of python3, python3.13 … that is new enough
#   TORCH        which torch: anything pip takes, or `skip`   default: the last choice for VENV, else torch==2.13.0
#                skip = the torch that is there: VENV's own, or the machine's, which a new VENV then sees
#   TORCH_INDEX  the package index that holds that build      default: the last choice for VENV, else pip's own
#   CONSTRAINTS  the pins                                     default: constraints.txt
#   LOCKED       1 = everything but torch only as a file whose sha256 stands in requirements.lock; for `dev` alone,
#                since no other extra is wholly in there. torch then needs an index that you trust (TORCH_INDEX)
#
# Why torch comes first and alone: on Linux, pip's usual index serves a torch that brings gigabytes of CUDA
# libraries, and any package that needs torch would fetch that one. PyTorch's installation page names the index
# of each other build; `TORCH_INDEX=<the cpu one> scripts/setup.sh` is the small one. Whatever came in this way
# is then pinned to the letter, so that nothing after it can replace it.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

CONSTRAINTS=${CONSTRAINTS:-$root/constraints.txt}
case $CONSTRAINTS in /*) ;; *) CONSTRAINTS=$PWD/$CONSTRAINTS ;; esac
python=$VENV/bin/python
stamp=$VENV/draftsmith.stamp
log=$VENV/setup.log
choice=$VENV/draftsmith.torch
last_torch='' last_index=''
if [ -e "$choice" ]; then
    { read -r last_torch && read -r last_index; } <"$choice" || true
fi
if [ -z "${TORCH:-}${TORCH_INDEX:-}" ]; then
    TORCH=$last_torch TORCH_INDEX=$last_index
fi
TORCH=${TORCH:-torch==2.13.0} TORCH_INDEX=${TORCH_INDEX:-}
LOCKED=${LOCKED:-0}
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

stage() { # stage WORDS COMMAND…: one line with seconds; the command's own words only if it fails
    local began=$SECONDS
    printf 'setup: %s ... ' "$1"
    shift
    if "$@" >>"$log" 2>&1; then
        printf '%s s\n' $((SECONDS - began))
    else
        printf 'failed; the end of %s:\n' "$log"
        tail -n 20 -- "$log" >&2
        exit 1
    fi
}

find_python() {
    local name found='' names=(python3 python3.14 python3.13 python3.12 python3.11 python)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        command -v -- "$name" >/dev/null || continue
        if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found="$found $name is older than 3.11;"
        elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            found="$found $name has no venv module (Debian: install python3-venv);"
        else
            printf '%s\n' "$name"
            return
        fi
    done
    die "needs Python 3.11 or newer:${found:- none was found;} say PYTHON=/path/to/python3"
}

# What is asked, what is there -> "HASH EXTRAS" to install, or nothing if all of it is there.
plan() {
    "$python" - "$root" "$stamp" "$CONSTRAINTS" "$TORCH" "$TORCH_INDEX" "$LOCKED" "$*" <<'PY'
import hashlib, pathlib, re, sys, tomllib

root, stamp, constraints, torch, index, locked, asked = sys.argv[1:]
project = pathlib.Path(root, "pyproject.toml").read_bytes()
wanted = set(re.split(r"[\s,]+", asked)) - {""}
known = tomllib.loads(project.decode())["project"]["optional-dependencies"]
if wrong := wanted - set(known):
    sys.exit(f"setup: no such extra: {', '.join(sorted(wrong))}; there are {', '.join(known)}")
parts = [project, pathlib.Path(constraints).read_bytes(), torch.encode(), index.encode(), sys.version.encode()]
if locked == "1":
    parts.append(pathlib.Path(root, "requirements.lock").read_bytes())
inputs = hashlib.sha256(b"\0".join(parts)).hexdigest()
lines = pathlib.Path(stamp).read_text().splitlines() if pathlib.Path(stamp).exists() else []
before, there = (lines + ["", ""])[:2]
if inputs != before or not wanted <= set(there.split(",")):
    print(inputs, ",".join(sorted(wanted | (set(there.split(",")) & set(known)))))
PY
}

# Only files whose hash is in requirements.lock. Some are sources, which are built without fetching more: by the
# setuptools of the lock, and beside the torch that is there.
locked() {
    local strict=(--require-hashes --no-deps --no-build-isolation)
    grep -A1000 '^setuptools==' -- requirements.lock | sed '1!{/^[^ ]/,$d}' >"$VENV/setuptools.lock"
    "$python" -m pip install "${strict[@]}" -r "$VENV/setuptools.lock" &&
        "$python" -m pip install "${strict[@]}" -r requirements.lock &&
        "$python" -m pip install --no-deps --no-build-isolation -e . &&
        "$python" -m pip check
}

cd -- "$root"
case $LOCKED in
0) ;;
1) [ "$*" = dev ] || die "LOCKED=1: requirements.lock is of the extra dev; say LOCKED=1 scripts/setup.sh dev" ;;
*) die "LOCKED=$LOCKED: say 1 or 0" ;;
esac

# An environment of ours whose python is gone, or that was made for another place (its commands name that place),
# is made anew. What somebody else made is used as it is, or left alone.
mark=$VENV/draftsmith.root
if [ -e "$mark" ] && [ "$(cat -- "$mark")" != "$VENV $root" ]; then
    usable=no
else
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && usable=yes || usable=no
fi
if [ "$usable" = no ]; then
    interpreter=$(find_python)
    if [ -e "$mark" ]; then
        rm -rf -- "$VENV"
    elif [ -n "$(ls -A -- "$VENV" 2>/dev/null)" ]; then
        die "$VENV is there and holds no python of 3.11 or newer; choose another VENV"
    fi
    mkdir -p -- "$VENV"
    printf '%s\n' "$VENV $root" >"$mark"
    machine=()
    [ "$TORCH" != skip ] || machine=(--system-site-packages)
    stage "$("$interpreter" --version) in $VENV" "$interpreter" -m venv ${machine[@]+"${machine[@]}"} "$VENV"
fi

todo=$(plan "$@")
[ -n "$todo" ] || exit 0
inputs=${todo%% *}
extras=${todo#* }
rm -f -- "$stamp" "$log" # from here on an interruption leaves no stamp

"$python" -m pip --version >/dev/null 2>&1 || stage "pip" "$python" -m ensurepip
if [ "$TORCH" != skip ]; then
    # Another build of the same version would count as present: out with the one that is there.
    if [ -n "$last_torch" ] && [ "$last_torch $last_index" != "$TORCH $TORCH_INDEX" ]; then
        stage "without $last_torch" "$python" -m pip uninstall -y torch
    fi
    printf '%s\n' "$TORCH" "$TORCH_INDEX" >"$choice"
    stage "$TORCH" "$python" -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
else
    printf '%s\n' "$TORCH" "" >"$choice"
fi
torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) ||
    die "TORCH=skip, but there is no torch in $VENV"
if [ "$LOCKED" = 1 ]; then
    stage "draftsmith[dev] from requirements.lock on torch $torch" locked
else
    { grep -v -i '^torch==' -- "$CONSTRAINTS" || true; } >"$VENV/constraints.txt"
    printf 'torch==%s\n' "$torch" >>"$VENV/constraints.txt"
    stage "draftsmith${extras:+[$extras]} on torch $torch" \
        "$python" -m pip install -c "$VENV/constraints.txt" -e ".${extras:+[$extras]}"
fi

printf '%s\n' "$inputs" "$extras" >"$stamp.$$"
mv -- "$stamp.$$" "$stamp"
