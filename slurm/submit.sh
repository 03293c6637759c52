#!/usr/bin/env bash
# Submit a recipe as a chain of Slurm jobs and return. Details: docs/clusters.md.
#
#   slurm/submit.sh [--dry-run] RECIPE [key=value ...]
#
#   observe -> solve_export (a task per format) -> build (a task per format) -> evaluate -> report
#
# The formats are solved side by side, from the statistics that observe writes. Jobs without a stage in
# the recipe are omitted; import, if the recipe names it, belongs to observe. Settings of the cluster
# come from slurm/site.env.
# --dry-run prints the commands as a script and submits nothing; it does not need Slurm. Logs and job
# ids are in WORKDIR/slurm; `nemo-vlm-ptq status WORKDIR` shows the progress. Exit code 2: invalid
# input, described in one line; nothing is submitted. Sets up .venv first.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"

reject() {
    echo "error: $*" >&2
    exit 2
}
fail() { reject "$@"; } # also in launch/common.sh: invalid input has code 2

dry=
words=()
for word in "$@"; do
    case $word in
        --dry-run) dry=1 ;;
        -*) reject "unknown option $word; supported: --dry-run" ;;
        *) words+=("$word") ;;
    esac
done
((${#words[@]})) || reject "slurm/submit.sh requires a recipe, for example: slurm/submit.sh llava15_7b"

site=${NEMO_VLM_PTQ_SITE:-$root/slurm/site.env}
[[ -r $site ]] || reject "$site does not exist; copy slurm/site.env.example there and edit it"
ACCOUNT='' PARTITION='' NODES='' GPUS_PER_NODE='' GPU_TYPE='' OPTIONS=()
TIME_OBSERVE='' TIME_SOLVE='' TIME_BUILD='' TIME_EVALUATE='' TIME_REPORT='' # also declares them for shellcheck
# shellcheck source=/dev/null
source "$site" || reject "$site cannot be sourced by bash"
require_number "NODES in $site" "$NODES" 1
require_number "GPUS_PER_NODE in $site" "$GPUS_PER_NODE" 0
declare -A capability=([a100]=80 [l4]=89 [l40]=89 [l40s]=89 [h100]=90 [h200]=90 [gh200]=90
    [b100]=100 [b200]=100 [gb200]=100 [b300]=103 [gb300]=103)
[[ -z $GPU_TYPE || " ${!capability[*]} " == *" $GPU_TYPE "* ]] ||
    reject "GPU_TYPE in $site must be empty or one of ${!capability[*]}, got ${GPU_TYPE@Q}"
if [[ -z $dry ]]; then
    command -v sbatch >/dev/null ||
        reject "sbatch is not on PATH; submit from a node of the cluster or add --dry-run"
    known=$(sinfo -h -o %R 2>&1) || reject "sinfo failed: ${known%%$'\n'*}"
    if [[ -n $PARTITION ]] && ! grep -qxF -- "$PARTITION" <<<"$known"; then
        reject "PARTITION in $site does not exist, got $PARTITION; available: $(sort <<<"$known" | xargs)"
    fi
fi

# Settings of the recipe, validated by the package.
set_up
facts=$("$venv/bin/nemo-vlm-ptq" plan "${words[@]}" --json) || exit $?
mapfile -td '' values < <("$venv/bin/python" -c '
import json, os, sys
facts = json.load(sys.stdin)
tensor, pipeline, data = (0 if n == "auto" else n for n in facts["parallel"].values())
logs = os.path.join(os.path.realpath(facts["workdir"]), "slurm")
values = [logs, " ".join(facts["stages"]), max(1, tensor) * max(1, pipeline), data]
for name, info in facts["formats"].items():
    major, minor = info["engine_capability"]
    values += [name, 10 * major + minor]
sys.stdout.write("".join(f"{value}\0" for value in values))
' <<<"$facts")
((${#values[@]} > 5)) || reject "nemo-vlm-ptq plan printed no facts of the recipe"
logs=${values[0]} model=${values[2]} data=${values[3]}
read -ra stages <<<"${values[1]}"
require_number "tensor x pipeline" "$model" 1
require_number "parallel.data" "$data" 0

ranks=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))
((NODES * ranks % model == 0 && (data == 0 || NODES * ranks == model * data))) ||
    reject "parallel: tensor x pipeline is $model$( ((data)) && echo " and data is $data"), but" \
        "NODES=$NODES and GPUS_PER_NODE=$GPUS_PER_NODE in $site give $((NODES * ranks)) ranks"

available=999 # compute capability times ten
[[ -z $GPU_TYPE ]] || available=${capability[$GPU_TYPE]}
formats='' tasks=0
set -- "${values[@]:4}"
while (($#)); do
    [[ $1 =~ ^[a-z0-9_]+$ ]] || reject "format ${1@Q} has no valid name"
    require_number "the capability that format $1 needs" "$2" 0
    formats+=${formats:+,}$1 tasks=$((tasks + 1))
    if [[ " ${stages[*]} " == *" build "* ]] && (($2 > available)); then
        reject "format $1: engines require compute capability $2, but $GPU_TYPE has $available;" \
            "remove the format, or remove build from stages"
    fi
    shift 2
done

if [[ -z $dry ]]; then
    mkdir -p "$logs" 2>/dev/null || reject "cannot create the log folder $logs"
    [[ -w $logs ]] || reject "cannot write to the log folder $logs"
    if [[ -s $logs/jobs ]]; then
        before=$(cut -d ' ' -f 1 "$logs/jobs" | paste -sd ,)
        before=$(squeue -h -j "$before" -o %A 2>/dev/null | sort -u | xargs) || before= # ids that Slurm no longer knows
        [[ -z $before ]] || reject "jobs $before of an earlier submission still use the workdir;" \
            "wait for them, or run: scancel $before"
    fi
fi

# Print arguments quoted for the shell, with quotes only where needed.
quoted() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./:,=%@+-]+$ ]] || word=${word@Q}
        line+=${line:+ }$word
    done
    echo "$line"
}

# queue NAME DEPENDENCY STAGES OPTION ...: submit a job after the previous one if the recipe lists any
# of its stages.
last=
queued=()
queue() {
    local name=$1 kind=$2 own=() after='' id stage command
    for stage in $3; do
        [[ " ${stages[*]} " != *" $stage "* ]] || own+=("$stage")
    done
    ((${#own[@]})) || return 0
    shift 3
    command=(sbatch --parsable ${ACCOUNT:+--account="$ACCOUNT"} ${PARTITION:+--partition="$PARTITION"}
        "${OPTIONS[@]}" "$@")
    if [[ -n $last ]]; then
        command+=(--kill-on-invalid-dep=yes)
        after=--dependency=$kind:$last
    fi
    local arguments=("$root/slurm/$name.sbatch" "$root")
    [[ $* != *--array=* ]] || arguments+=("$formats")
    arguments+=("${words[@]}" "stages=[$(IFS=, && echo "${own[*]}")]")
    if [[ -n $dry ]]; then
        echo "$name=\$($(quoted "${command[@]}")${after:+ \"$after\"} $(quoted "${arguments[@]}"))"
        last=\$$name
        return
    fi
    if ! id=$("${command[@]}" ${after:+"$after"} "${arguments[@]}" 2>&1); then
        ((!${#queued[@]})) || scancel "${queued[@]}"
        reject "sbatch rejected $name; no job remains queued: ${id//$'\n'/; }"
    fi
    last=${id%%;*}
    queued+=("$last")
    echo "$last $name" | tee -a "$logs/jobs.new"
}

pattern=${logs//%/%%} # sbatch takes % for itself
node=(--output="$pattern/%x_%j.log")
array=(--output="$pattern/%x_%A_%a.log")
count=0-$((tasks - 1))
gpus=()
((!GPUS_PER_NODE)) || gpus=(--gpus-per-node="$GPUS_PER_NODE")
all=(--nodes="$NODES" "${gpus[@]}")

rm -f "$logs/jobs.new"
queue observe "" "import observe" --time="$TIME_OBSERVE" "${all[@]}" "${node[@]}"
queue solve_export afterok "solve export verify" --time="$TIME_SOLVE" "${all[@]}" "${array[@]}" --array="$count"
queue build aftercorr build --time="$TIME_BUILD" --nodes=1 "${gpus[@]}" "${array[@]}" --array="$count%1"
queue evaluate afterok evaluate --time="$TIME_EVALUATE" "${all[@]}" "${node[@]}"
queue report afterany report --time="$TIME_REPORT" --nodes=1 "${node[@]}"
[[ -z $dry ]] || exit 0
echo "$facts" >"$logs/recipe.json"
rm -f "$logs/../failures.jsonl"
mv "$logs/jobs.new" "$logs/jobs"
