#!/usr/bin/env bash
# scripts/torchrun.sh [key=value …]: a verb of draftsmith as several processes, on this node or on several that all run
# this command; the arguments are the verb's. Where one process ends badly all end, and the same command goes on from
# the last checkpoint. docs/multi_node.md tells the rest.
#
#   NPROC         processes on this node: a number, or `gpu` for one per GPU       default: gpu
#   VERB          train or distill                                                 default: train
#   MAX_RESTARTS  how often they are all started anew after one of them was lost   default: 0
#   NNODES        nodes                                                            default: 1; several need
#   MASTER        host:port of one of the nodes, where they meet
#   NODE_RANK     0 on that node, another number elsewhere; needed only where a node cannot tell by its own name
#   LOCAL_ADDR    the address by which the others reach this node                  default: its host name's
#   JOB_ID        a name of this run, the same on all nodes                        default: draftsmith
#   LEAVE         seconds for the checkpoint of a run that a signal stops          default: 600
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

how=(--nnodes "${NNODES:=1}" --nproc-per-node "${NPROC:-gpu}" --max-restarts "${MAX_RESTARTS:-0}")
if [ "$NNODES" = 1 ]; then
    how+=(--standalone)
else
    how+=(--rdzv-backend c10d --rdzv-endpoint "${MASTER:?host:port of one of the $NNODES nodes}")
    how+=(--rdzv-id "${JOB_ID:-draftsmith}")
    case ${NODE_RANK:-} in
    '') ;;
    0) how+=(--rdzv-conf is_host=1) ;;
    *) how+=(--rdzv-conf is_host=0) ;;
    esac
    [ -z "${LOCAL_ADDR:-}" ] || how+=(--local-addr "$LOCAL_ADDR")
fi
# torchrun's processes meet in a store that outlives a restart: the new ones would find the addresses of the old ones
# (pytorch/pytorch#135712).
[ "${MAX_RESTARTS:-0}" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for every start
# What the agent hears it passes on to the processes, and waits for them.
how+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${LEAVE:-600}")
exec "$VENV/bin/torchrun" "${how[@]}" -m "draftsmith.${VERB:-train}" "$@"
