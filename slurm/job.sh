# shellcheck shell=bash
# Sourced by the .sbatch files, whose arguments are ROOT [FORMATS] RECIPE [key=value ...].
#
#   on_ranks RANKS STAGES RECIPE [key=value ...]     run stages on RANKS ranks per node; all: one per GPU
#
# Slurm sends USR1 90 seconds before the time limit and on preemption. The job then lets its ranks
# save their progress, requeues itself and resumes after the restart. On TERM, which cancels a job,
# the ranks save their progress and the job is not requeued.

most=20 # maximum number of requeues, so that a job without progress ends
step=
stopping=
trap 'stopping=1; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1

# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
# shellcheck source=/dev/null
source "${NEMO_VLM_PTQ_SITE:-$root/slurm/site.env}"
require_number GPUS_PER_NODE "$GPUS_PER_NODE" 0
require_number SLURM_JOB_ID "$SLURM_JOB_ID" 1
require_number SLURM_RESTART_COUNT "${SLURM_RESTART_COUNT:-0}" 0

# Print the format of this array task, of a list with commas.
format_of_task() {
    local formats
    IFS=, read -ra formats <<<"$1"
    require_number SLURM_ARRAY_TASK_ID "$SLURM_ARRAY_TASK_ID" 0
    [[ -n ${formats[SLURM_ARRAY_TASK_ID]:-} ]] ||
        fail "array task $SLURM_ARRAY_TASK_ID has no format in ${1@Q}"
    echo "${formats[SLURM_ARRAY_TASK_ID]}"
}

on_ranks() {
    local ranks=$1 stages=$2 recipe=$3 code=0 options=(--ntasks-per-node=1 --kill-on-bad-exit=1)
    shift 3
    [[ $ranks != all ]] || ranks=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))
    options+=(--nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES") # also after the job was resized
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    [[ -z $IMAGE ]] || options+=(--container-image="$IMAGE" --container-workdir="$PWD")
    [[ -z $IMAGE || -z $MOUNTS ]] || options+=(--container-mounts="$MOUNTS")
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
    export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) NNODES=$SLURM_NNODES
    export GPUS_PER_NODE=$ranks
    echo "== job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST:" \
        "$stages, $(date '+%F %T')"
    srun "${options[@]}" "$root/launch/run.sh" run "$recipe" "stages=[$stages]" "$@" &
    step=$!
    wait "$step" || code=$?
    if [[ -n $stopping ]]; then # the signal interrupted the first wait
        code=0
        wait "$step" || code=$?
    fi
    if [[ -n $stopping ]] && ((code && ${SLURM_RESTART_COUNT:-0} < most)); then
        echo "== job $SLURM_JOB_ID is requeued, $(date '+%F %T')"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
