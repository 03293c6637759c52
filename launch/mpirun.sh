#!/usr/bin/env bash
# Run a command with Open MPI's mpirun on one or more machines; start it on one of them.
#
#   launch/mpirun.sh COMMAND RECIPE [key=value ...]     for example: run llava15_7b
#
#   GPUS_PER_NODE   ranks per machine; default: the number of GPUs of this machine, at least 1
#   NNODES          number of machines; default: 1
#   HOSTFILE        Open MPI's host file; not needed inside a Slurm job
#
# Sets up .venv first. All machines must share the repository and the workdir.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# > 1)) || fail "launch/mpirun.sh requires a command and a recipe, for example: run llava15_7b"
check_counts
[[ $(mpirun --version 2>&1) == *"Open MPI"* ]] ||
    fail "Open MPI's mpirun is not on PATH (on Debian and Ubuntu: apt install openmpi-bin)"
NNODES=1 set_up mpi # this script runs on one machine only
count_ranks
options=(-n $((nodes * ranks)) --map-by "ppr:$ranks:node:OVERSUBSCRIBE" --bind-to none
    -x OMP_NUM_THREADS)
[[ -z ${HOSTFILE:-} ]] || options+=(--hostfile "$HOSTFILE")
((nodes > 1)) || options+=(--mca btl ^tcp) # its sockets would listen on all addresses
((UID)) || options+=(--allow-run-as-root)
exec mpirun "${options[@]}" "$venv/bin/python" -m nemo_vlm_ptq "$@"
