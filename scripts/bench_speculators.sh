#!/usr/bin/env bash
# scripts/bench_speculators.sh: what our EAGLE-3 training step costs beside that of speculators 0.9.0, on the same
# weights and rows. First whether both find the same loss and gradients, then CPU time of one thread, in processes that
# take turns. Both sides are told in scripts/peers/.
#
#   RUNS        processes of each side                    default: 5
#   DTYPE       bfloat16 or float32                       default: bfloat16 where this CPU multiplies in it
#   FOLDER      what both sides read, and what they say   default: runs/speculators
#   PEER_VENV   the peer's own environment, made once     default: .venv-speculators
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
"$root/scripts/setup.sh"
cd -- "$root"
RUNS=${RUNS:-5} FOLDER=${FOLDER:-runs/speculators} PEER_VENV=${PEER_VENV:-.venv-speculators}
if [ -z "${DTYPE:-}" ]; then
    DTYPE=float32
    ! grep -q -w -e avx512_bf16 -e amx_bf16 /proc/cpuinfo || DTYPE=bfloat16
fi

mkdir -p -- "$FOLDER"
rm -f -- "$FOLDER"/*.json "$FOLDER/log"

ended() { # ended WHAT: with the last words of the log
    echo "bench: $1 failed; the end of $FOLDER/log:" >&2
    tail -n 20 -- "$FOLDER/log" >&2
    exit 1
}

# Torch first, as in setup.sh: whatever else needs it would bring gigabytes of CUDA libraries. Of the peer's
# dependencies only those that its EAGLE-3 model imports; transformers is the newest that it allows.
if [ ! -e "$PEER_VENV/complete" ]; then
    echo "bench: speculators 0.9.0 in $PEER_VENV"
    index=$(sed -n 2p -- "$VENV/draftsmith.torch" 2>/dev/null || true)
    "$VENV/bin/python" -m venv "$PEER_VENV"
    install() {
        "$PEER_VENV/bin/python" -m pip install --disable-pip-version-check "$@" >>"$FOLDER/log" 2>&1 || ended "pip install $*"
    }
    install ${index:+--index-url "$index"} torch==2.13.0
    install transformers==5.19.0 safetensors numpy pydantic pydantic-settings loguru openai datasets
    install --no-deps speculators==0.9.0 hs-connectors==0.9.0
    touch -- "$PEER_VENV/complete"
fi

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

side() { # side ENVIRONMENT SCRIPT ARGUMENT…: its words go to the log
    local python=$1/bin/python script=scripts/peers/$2_step.py
    shift 2
    timeout 1800 "$python" "$script" "$@" 2>>"$FOLDER/log" || ended "$script $*"
}
side "$VENV" draftsmith prepare "$FOLDER" >>"$FOLDER/log"
side "$PEER_VENV" speculators equal "$FOLDER"
for run in $(seq "$RUNS"); do
    side "$VENV" draftsmith time "$FOLDER" "$DTYPE" "$FOLDER/ours-$run.json" >>"$FOLDER/log"
    side "$PEER_VENV" speculators time "$FOLDER" "$DTYPE" "$FOLDER/theirs-$run.json" >>"$FOLDER/log"
done
echo "$DTYPE, load $(cut -d' ' -f1 /proc/loadavg)"
side "$VENV" draftsmith table "$FOLDER"
