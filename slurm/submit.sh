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
[[ $NODES =~ ^[1-9][0-9]*$ ]] || reject "NODES in $site must be a positive integer, got '$NODES'"
[[ $GPUS_PER_NODE =~ ^[0-9]+$ ]] || reject "GPUS_PER_NODE in $site must be an integer from 0, got '$GPUS_PER_NODE'"
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
mapfile -t lines < <("$venv/bin/python" -c '
import json, sys
facts = json.load(sys.stdin)
tensor, pipeline, data = (0 if n == "auto" else n for n in facts["parallel"].values())
print(facts["workdir"], " ".join(facts["stages"]), max(1, tensor) * max(1, pipeline), data, sep="\n")
for name, info in facts["formats"].items():
    major, minor = info["engine_capability"]
    print(name, 10 * major + minor)
' <<<"$facts")
logs=$(realpath -m -- "${lines[0]}")/slurm
read -ra stages <<<"${lines[1]}"
model=${lines[2]} data=${lines[3]}

ranks=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))
((NODES * ranks % model == 0 && (data == 0 || NODES * ranks == model * data))) ||
    reject "parallel: tensor x pipeline is $model$( ((data)) && echo " and data is $data"), but" \
        "NODES=$NODES and GPUS_PER_NODE=$GPUS_PER_NODE in $site give $((NODES * ranks)) ranks"

declare -A capability=([a100]=80 [l4]=89 [l40]=89 [l40s]=89 [h100]=90 [h200]=90 [gh200]=90
    [b100]=100 [b200]=100 [gb200]=100 [b300]=103 [gb300]=103)
[[ -z $GPU_TYPE || -v capability[$GPU_TYPE] ]] ||
    reject "GPU_TYPE in $site must be empty or one of ${!capability[*]}, got $GPU_TYPE"
formats=
for line in "${lines[@]:4}"; do
    read -r format need <<<"$line"
    formats+=${formats:+,}$format
    if [[ " ${stages[*]} " == *" build "* && -n $GPU_TYPE ]] && ((need > capability[$GPU_TYPE])); then
        reject "format $format: engines require compute capability $need, but $GPU_TYPE has" \
            "${capability[$GPU_TYPE]}; remove the format, or remove build from stages"
    fi
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

node=(--output="$logs/%x_%j.log")
tasks=(--output="$logs/%x_%A_%a.log")
count=0-$((${#lines[@]} - 5))
gpus=()
((!GPUS_PER_NODE)) || gpus=(--gpus-per-node="$GPUS_PER_NODE")
all=(--nodes="$NODES" "${gpus[@]}")

rm -f "$logs/jobs.new"
queue observe "" "import observe" --time="$TIME_OBSERVE" "${all[@]}" "${node[@]}"
queue solve_export afterok "solve export verify" --time="$TIME_SOLVE" "${all[@]}" "${tasks[@]}" --array="$count"
queue build aftercorr build --time="$TIME_BUILD" --nodes=1 "${gpus[@]}" "${tasks[@]}" --array="$count%1"
queue evaluate afterok evaluate --time="$TIME_EVALUATE" "${all[@]}" "${node[@]}"
queue report afterany report --time="$TIME_REPORT" --nodes=1 "${node[@]}"
[[ -z $dry ]] || exit 0
echo "$facts" >"$logs/recipe.json"
rm -f "$logs/../failures.jsonl"
mv "$logs/jobs.new" "$logs/jobs"
