#!/usr/bin/env bash
# Translate the options of Model Optimizer's example script of this name into recipe keys and run.
#
#   launch/huggingface_example.sh --type llava --model DIR --quant fp8 --tp 2 --calib_dataset DIR \
#       --tasks build,gqa evaluate.data=DIR
#
# docs/clusters.md lists the status of each option. Arguments key=value override recipe keys.
# saved_models_... is created in ROOT_SAVE_PATH, by default in the current folder. Sets up .venv
# first.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Options that map to one recipe key, and options that this script handles itself.
declare -A key=(
    [type]=family [model]=model [quant]=quantize.format [kv_cache_quant]=quantize.kv_cache
    [awq_block_size]=quantize.group_size [tp]=export.tensor [pp]=export.pipeline
    [calib_tp]=parallel.tensor [calib]=calibration.samples [calib_dataset]=calibration.data
    [calib_batch_size]=calibration.micro_batch [batch]=engine.max_batch_size
    [input]=engine.max_input_len
    [kv_cache_free_gpu_memory_fraction]=engine.kv_cache_free_gpu_memory_fraction
)
own=(output export_fmt tasks sparsity)
lm="text-only tasks are not supported; gqa evaluates on images"
bits="all linears use the same format"
declare -A gone=(
    [auto_quantize_bits]=$bits [effective_bits]=$bits [lm_eval_tasks]=$lm [lm_eval_limit]=$lm
    [simple_eval_tasks]=$lm [num_samples]="$lm; evaluate.limit=N limits the number of questions"
)
layout="the parallel layout is chosen to fit memory; parallel.tensor=N sets it explicitly"
declare -A ignored=([gpu_max_mem_percentage]=$layout) # with a value
declare -A flags=(
    [trust_remote_code]="code from model repositories is never run"
    [use_seq_device_map]=$layout [low_memory_mode]=$layout [no-verbose]="there is no verbose output"
)

declare -A given=()
overrides=()
while (($#)); do
    word=$1
    shift
    if [[ $word == --*=* ]]; then
        set -- "${word#*=}" "$@"
        word=${word%%=*}
    fi
    name=${word#--}
    if [[ $word != --* ]]; then
        [[ $word == ?*=* ]] || fail "unexpected argument ${word@Q}; expected an option or key=value"
        overrides+=("$word")
    elif [[ ! $name =~ ^[a-z][a-z_-]*$ ]]; then # [[ -v ]] would evaluate it
        fail "unknown option ${word@Q}"
    elif [[ -v flags[$name] ]]; then
        echo "--$name is ignored: ${flags[$name]}" >&2
    elif [[ -v gone[$name] ]]; then
        fail "--$name is not supported: ${gone[$name]}"
    elif [[ -v key[$name] || -v ignored[$name] || " ${own[*]} " == *" $name "* ]]; then
        (($#)) || fail "--$name requires a value"
        [[ ! -v ignored[$name] ]] || echo "--$name is ignored: ${ignored[$name]}" >&2
        [[ -z $1 ]] || given[$name]=$1 # an empty value means the default
        shift
    else
        known=$(printf -- '--%s\n' "${!key[@]}" "${own[@]}" "${!ignored[@]}" "${!flags[@]}" | sort)
        fail "unknown option $word; supported: ${known//$'\n'/ }"
    fi
done

for name in model type quant; do
    [[ -n ${given[$name]:-} ]] || fail "required option --$name is missing"
done
[[ ${given[sparsity]:-dense} == dense ]] ||
    fail "--sparsity must be dense, got ${given[sparsity]@Q}; weights are not pruned"
case ${given[export_fmt]:=tensorrt_llm} in
    tensorrt_llm) target=trtllm tasks=build ;;
    hf) target=hf tasks=quant ;;
    *) fail "--export_fmt must be tensorrt_llm or hf, got ${given[export_fmt]@Q}" ;;
esac
case ${given[type]} in # families with many or with few tokens per image
    phi | llava_next) input=4096 batch=4 ;;
    *) input=1024 batch=20 ;;
esac
case ${given[quant]} in
    int8_sq | int8_smoothquant) cache=none ;;
    *) cache=fp8 ;;
esac
[[ ${given[calib_batch_size]:-} != 0 ]] || unset 'given[calib_batch_size]' # 0 means the default
: "${given[input]:=$input}" "${given[batch]:=$batch}" "${given[kv_cache_quant]:=$cache}"
: "${given[tp]:=1}" "${given[pp]:=1}" "${given[output]:=512}" "${given[tasks]:=$tasks}"
for name in input output; do
    require_number "--$name" "${given[$name]}" 1
done

stages="observe, solve, export, verify" form=export data=
for task in ${given[tasks]//,/ }; do
    [[ $task =~ ^(quant|build|gqa)$ ]] || fail "--tasks must be a list of quant, build, gqa, got ${task@Q}: $lm"
done
if [[ ,${given[tasks]}, == *,build,* ]]; then
    stages+=", build" form=engine
fi
if [[ ,${given[tasks]}, == *,gqa,* ]]; then
    stages+=", evaluate"
    for word in "${overrides[@]}"; do
        [[ $word != evaluate.data=* ]] || data=$word
    done
    [[ -n $data ]] || fail "--tasks gqa requires evaluate.data=DIR, a folder with" \
        "testdev_balanced_questions.json and images/"
fi

name=$(basename -- "${given[model]}" | sed 's/[^0-9a-zA-Z-]/_/g')
save=saved_models_${name}_dense_${given[quant]}_tp${given[tp]}_pp${given[pp]}
[[ $target != hf ]] || save+=_hf
words=("workdir=${ROOT_SAVE_PATH:-$PWD}/$save" "stages=[$stages, report]"
    "export.targets=[$target]" "engine.max_seq_len=$((given[input] + given[output]))"
    "evaluate.from=$form")
for name in $(printf '%s\n' "${!key[@]}" | sort); do
    [[ ! -v given[$name] ]] || words+=("${key[$name]}=${given[$name]}")
done
set_up
set -x
exec "$venv/bin/nemo-vlm-ptq" run "$root/launch/huggingface_example.yaml" "${words[@]}" \
    "${overrides[@]}"
