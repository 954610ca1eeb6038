#!/usr/bin/env bash
# scripts/deepspeed.sh [key=value …]: a verb of draftsmith as several processes, started by DeepSpeed's launcher; the
# arguments are the verb's. Which engine trains is said by strategy=…, whoever starts the processes.
#
#   HOSTFILE   a line for each node, as `node1 slots=8`                     default: this node, with NPROC processes
#   NPROC      without a HOSTFILE: processes on this node                   default: one per GPU
#   VERB       train or distill                                             default: train
#   NODE_RANK  which line of HOSTFILE this node is, from 0, where the command is run on every node; without it
#              one command starts all of them, through ssh without a password, by the launcher LAUNCHER
#   LAUNCHER   pdsh, openmpi, …: what reaches the other nodes               default: pdsh
#   MASTER     host:port of the first node                                  default: HOSTFILE's first host, port 29500
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# --no_local_rank: else it appends --local_rank=N, which is no key of ours.
how=(--no_local_rank --quiet)
nodes=1 first=127.0.0.1
if [ -n "${HOSTFILE:-}" ]; then
    hosts=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -- "$HOSTFILE" | awk '{print $1}')
    nodes=$(wc -l <<<"$hosts")
    [ "$nodes" = 1 ] || first=$(head -n 1 <<<"$hosts")
    how+=(--hostfile "$HOSTFILE")
else
    how+=(--hostfile /dev/null) # not the machine's /job/hostfile
    [ -z "${NPROC:-}" ] || how+=(--num_gpus "$NPROC")
fi
# An address that is told need not be asked for: asking takes ssh, even of this very node.
MASTER=${MASTER:-$first:29500}
how+=(--master_addr "${MASTER%:*}" --master_port "${MASTER##*:}")
if [ "$nodes" = 1 ]; then
    how+=(--no_ssh_check)
elif [ -n "${NODE_RANK:-}" ]; then
    how+=(--no_ssh --node_rank "$NODE_RANK")
else
    how+=(--launcher "${LAUNCHER:-pdsh}")
fi

# The launcher passes no signal on. The processes get it here: they save, answer 75, and so does everything above them.
pass_on() {
    local helper
    if [ "$nodes" -gt 1 ] && [ -z "${NODE_RANK:-}" ]; then
        kill -s TERM "$launcher" # which then ends the processes on all nodes
        return
    fi
    for helper in $(pgrep -P "$launcher"); do
        pkill -TERM -P "$helper" || true
    done
}
"$VENV/bin/deepspeed" "${how[@]}" --module "draftsmith.${VERB:-train}" "$@" &
launcher=$!
trap pass_on TERM INT HUP USR1
while :; do
    status=0
    wait "$launcher" || status=$?
    kill -0 "$launcher" 2>/dev/null || break # else a signal has ended the waiting, not the run
done
exit "$status"
