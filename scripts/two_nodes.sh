#!/usr/bin/env bash
# scripts/two_nodes.sh up | down | on 0|1 COMMAND …: two nodes on one Linux machine, to try a command that wants several:
# network namespaces with one address each, 10.77.0.1 and 10.77.0.2, joined by a virtual cable. Needs root and iproute2.
#
#   up     makes them
#   on N   runs the command on node N, with what scripts/torchrun.sh and scripts/deepspeed.sh want to know
#   down   kills what runs there, and removes them
set -euo pipefail

node() { printf 'draftsmith-%s' "$1"; } # its namespace
cable() { printf 'dscable%s' "$1"; }    # its end of the cable
address() { printf '10.77.0.%s' $(($1 + 1)); }

up() {
    local n
    ip netns add "$(node 0)"
    ip netns add "$(node 1)"
    ip link add "$(cable 0)" netns "$(node 0)" type veth peer name "$(cable 1)" netns "$(node 1)"
    for n in 0 1; do
        ip -n "$(node $n)" address add "$(address $n)/24" dev "$(cable $n)"
        ip -n "$(node $n)" link set "$(cable $n)" up
        ip -n "$(node $n)" link set lo up
    done
}

down() {
    local n pids
    for n in 0 1; do
        [ -e "/run/netns/$(node $n)" ] || continue
        pids=$(ip netns pids "$(node $n)")
        [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
        ip netns delete "$(node $n)"
    done
}

on() {
    local n=$1
    shift
    # Without a name for the cable gloo and NCCL tell the other node an address that is this one's alone.
    exec ip netns exec "$(node "$n")" env GLOO_SOCKET_IFNAME="$(cable "$n")" NCCL_SOCKET_IFNAME="$(cable "$n")" \
        NNODES=2 NODE_RANK="$n" LOCAL_ADDR="$(address "$n")" MASTER="$(address 0):29400" "$@"
}

case ${1:-} in
up | down) "$1" ;;
on) on "${@:2}" ;;
*)
    sed -n '2,7s/^# //p' -- "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
