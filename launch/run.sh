#!/usr/bin/env bash
# A command on ranks that torchrun starts: on this machine, or on several, with this on each.
#
#   launch/run.sh COMMAND RECIPE [key=value ...]        say, run llava15_7b_fp8
#
#   GPUS_PER_NODE   ranks on a machine; without it one a GPU, and one where there is none
#   NNODES          machines; 1 without it. With more:
#   NODE_RANK       0, 1, ...: which one this is; without it Slurm's SLURM_NODEID
#   MASTER_ADDR     name or address of machine 0
#   MASTER_PORT     a port that is free there; 29500 without it
#
# Sets up .venv first. All machines see the same repository and the same workdir.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# > 1)) || fail "launch/run.sh needs a command and a recipe, say: run llava15_7b_fp8"
check_counts
if ((nodes > 1)); then
    place=${NODE_RANK:-${SLURM_NODEID:-}}
    if [[ ! $place =~ ^(0|[1-9][0-9]*)$ ]] || ((place >= nodes)); then
        fail "NODE_RANK=$place is not one of 0 to $((nodes - 1)), with NNODES=$nodes"
    fi
    [[ -n ${MASTER_ADDR:-} ]] ||
        fail "MASTER_ADDR is not set; with NNODES=$nodes it names machine 0"
fi
set_up
count_ranks
where=(--standalone)
if ((nodes > 1)); then
    where=(--nnodes "$nodes" --node-rank "$place"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
# torchrun passes these on, so that ranks save what they have; another one would end it alone
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
exec "$venv/bin/python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$ranks" \
    -m nemo_vlm_ptq "$@"
