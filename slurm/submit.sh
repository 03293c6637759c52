#!/usr/bin/env bash
# Queues a recipe as a chain of Slurm jobs, and ends. docs/slurm.md has more.
#
#   slurm/submit.sh [--dry-run] RECIPE [key=value ...]
#
#   observe -> solve_export, one task a format -> build, one a format -> evaluate -> report
#
# Jobs whose stages the recipe does not list are left out. Site facts come from slurm/site.env.
# --dry-run prints the commands, as a script, and queues nothing; it needs no Slurm. Logs, and what
# was queued, lie in WORKDIR/slurm; `nemo-vlm-ptq status WORKDIR` tells how it goes. Exit code 2:
# you can fix it, one line says how, and nothing is queued. Sets up .venv first.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"

refuse() {
    echo "error: $*" >&2
    exit 2
}

dry=
words=()
for word in "$@"; do
    case $word in
        --dry-run) dry=1 ;;
        -*) refuse "unknown option $word; known: --dry-run" ;;
        *) words+=("$word") ;;
    esac
done
((${#words[@]})) || refuse "slurm/submit.sh needs a recipe, say: slurm/submit.sh llava15_7b"

site=${NEMO_VLM_PTQ_SITE:-$root/slurm/site.env}
[[ -r $site ]] || refuse "no $site; copy slurm/site.env.example there and fill it in"
ACCOUNT='' PARTITION='' NODES='' GPUS_PER_NODE='' GPU_TYPE='' OPTIONS=()
TIME_OBSERVE='' TIME_SOLVE='' TIME_BUILD='' TIME_EVALUATE='' TIME_REPORT='' # for shellcheck, too
# shellcheck source=/dev/null
source "$site" || refuse "$site cannot be read by bash"
[[ $NODES =~ ^[1-9][0-9]*$ ]] || refuse "NODES=$NODES in $site is no number of nodes"
[[ $GPUS_PER_NODE =~ ^[0-9]+$ ]] || refuse "GPUS_PER_NODE=$GPUS_PER_NODE in $site is no number"
if [[ -z $dry ]]; then
    command -v sbatch >/dev/null ||
        refuse "no sbatch on PATH; submit from a node of the cluster, or add --dry-run"
    known=$(sinfo -h -o %R 2>&1) || refuse "sinfo cannot ask the cluster: ${known%%$'\n'*}"
    if [[ -n $PARTITION ]] && ! grep -qxF -- "$PARTITION" <<<"$known"; then
        refuse "PARTITION=$PARTITION in $site is unknown; known: $(sort <<<"$known" | xargs)"
    fi
fi

# What the recipe asks for, checked by the package.
set_up
facts=$("$venv/bin/nemo-vlm-ptq" plan "${words[@]}" --json) || exit $?
mapfile -t lines < <("$venv/bin/python" -c '
import json, sys
facts = json.load(sys.stdin)
tensor, pipeline, data = (0 if n == "auto" else n for n in facts["parallel"].values())
print(facts["workdir"], " ".join(facts["stages"]), max(1, tensor) * max(1, pipeline), data, sep="\n")
for name, row in facts["formats"].items():
    major, minor = row["engine_capability"]
    print(name, 10 * major + minor)
' <<<"$facts")
logs=$(realpath -m -- "${lines[0]}")/slurm
read -ra stages <<<"${lines[1]}"
model=${lines[2]} data=${lines[3]}

ranks=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))
((NODES * ranks % model == 0 && (data == 0 || NODES * ranks == model * data))) ||
    refuse "parallel: one model takes $model ranks$( ((data)) && echo " and there are to be $data"), but" \
        "NODES=$NODES and GPUS_PER_NODE=$GPUS_PER_NODE in $site make $((NODES * ranks)) ranks"

declare -A capability=([a100]=80 [l4]=89 [l40]=89 [l40s]=89 [h100]=90 [h200]=90 [gh200]=90
    [b100]=100 [b200]=100 [gb200]=100 [b300]=103 [gb300]=103)
[[ -z $GPU_TYPE || -v capability[$GPU_TYPE] ]] ||
    refuse "GPU_TYPE=$GPU_TYPE in $site is unknown; leave it empty, or one of: ${!capability[*]}"
formats=
for line in "${lines[@]:4}"; do
    read -r format need <<<"$line"
    formats+=${formats:+,}$format
    if [[ " ${stages[*]} " == *" build "* && -n $GPU_TYPE ]] && ((need > capability[$GPU_TYPE])); then
        refuse "format $format: no engine of it runs on $GPU_TYPE, which has compute capability" \
            "${capability[$GPU_TYPE]}, and it needs $need; leave it out, or build out of stages"
    fi
done

if [[ -z $dry ]]; then
    mkdir -p "$logs" 2>/dev/null || refuse "cannot make the folder of logs, $logs"
    [[ -w $logs ]] || refuse "cannot write into the folder of logs, $logs"
    if [[ -s $logs/jobs ]]; then
        before=$(cut -d ' ' -f 1 "$logs/jobs" | paste -sd ,)
        before=$(squeue -h -j "$before" -o %A 2>/dev/null | sort -u | xargs) || before= # forgotten
        [[ -z $before ]] || refuse "jobs $before of the submit before are not over, and work in" \
            "the same workdir; wait for them, or: scancel $before"
    fi
fi

# Words as a shell would read them back, quotes only where they are needed.
quoted() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./:,=%@+-]+$ ]] || word=${word@Q}
        line+=${line:+ }$word
    done
    echo "$line"
}

# queue NAME DEPENDENCY STAGES OPTION ...: a job after the one before, if the recipe lists a stage of it.
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
        refuse "sbatch refuses $name, and nothing is queued: ${id//$'\n'/; }"
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
