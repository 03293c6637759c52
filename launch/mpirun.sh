#!/usr/bin/env bash
# A command on ranks that Open MPI's mpirun starts: on this machine, or on several, from one of them.
#
#   launch/mpirun.sh COMMAND RECIPE [key=value ...]     say, run llava15_7b_fp8
#
#   GPUS_PER_NODE   ranks on a machine; without it one a GPU of this one, and one where there is none
#   NNODES          machines; 1 without it
#   HOSTFILE        Open MPI's list of them; inside a Slurm job it knows them without
#
# Sets up .venv first. All machines see the same repository and the same workdir.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# > 1)) || fail "launch/mpirun.sh needs a command and a recipe, say: run llava15_7b_fp8"
check_counts
[[ $(mpirun --version 2>&1) == *"Open MPI"* ]] ||
    fail "no mpirun of Open MPI on PATH (on Debian and Ubuntu: apt install openmpi-bin)"
NNODES=1 set_up mpi # this machine alone runs this script
count_ranks
options=(-n $((nodes * ranks)) --map-by "ppr:$ranks:node:OVERSUBSCRIBE" --bind-to none
    -x OMP_NUM_THREADS)
[[ -z ${HOSTFILE:-} ]] || options+=(--hostfile "$HOSTFILE")
((UID)) || options+=(--allow-run-as-root)
exec mpirun "${options[@]}" "$venv/bin/python" -m nemo_vlm_ptq "$@"
