#!/usr/bin/env bash
# Run a command on the ranks of one or more machines; start this script on each of them.
#
#   launch/run.sh COMMAND RECIPE [key=value ...]        for example: run llava15_7b
#
#   GPUS_PER_NODE   ranks per machine; default: the number of GPUs, at least 1
#   NNODES          number of machines; default: 1. With more than 1:
#   NODE_RANK       rank of this machine, from 0; default: SLURM_NODEID
#   MASTER_ADDR     host name or address of machine 0, on which its rank 0 listens
#   MASTER_PORT     free port on machine 0; default: 29500
#
# Sets up .venv first. All machines must share the repository and the workdir.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# > 1)) || fail "launch/run.sh requires a command and a recipe, for example: run llava15_7b"
check_counts
place=0 address='' port=0 # one machine: the loopback address, any port
if ((nodes > 1)); then
    place=${NODE_RANK:-${SLURM_NODEID:-}}
    if [[ ! $place =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((place >= nodes)); then
        fail "NODE_RANK must be 0 to $((nodes - 1)) with NNODES=$nodes, got ${place@Q}"
    fi
    port=${MASTER_PORT:-29500}
    require_number MASTER_PORT "$port" 1
    [[ -n ${MASTER_ADDR:-} ]] ||
        fail "MASTER_ADDR must be set to the address of machine 0 with NNODES=$nodes"
    address=$MASTER_ADDR
fi
set_up
count_ranks
exec "$venv/bin/python" -m nemo_vlm_ptq.distributed.spawn "$ranks" "$nodes" "$place" \
    "$address" "$port" "$@"
