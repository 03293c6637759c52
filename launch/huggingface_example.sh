#!/usr/bin/env bash
# The options of Model Optimizer's example script of this name, as keys of a recipe.
#
#   launch/huggingface_example.sh --type llava --model DIR --quant fp8 --tp 2 --tasks build,gqa \
#       evaluate.data=DIR
#
# docs/launching.md says of each option what became of it. Words key=value go into the recipe as
# they are. ROOT_SAVE_PATH is where saved_models_... is made; the current folder without it.
# Sets up .venv first.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Options that are keys of a recipe, and those that this script itself has to understand.
declare -A key=(
    [type]=family [model]=model [quant]=quantize.format [kv_cache_quant]=quantize.kv_cache
    [awq_block_size]=quantize.group_size [tp]=export.tensor [pp]=export.pipeline
    [calib_tp]=parallel.tensor [calib]=calibration.samples [calib_dataset]=calibration.data
    [calib_batch_size]=calibration.micro_batch [batch]=engine.max_batch_size
    [input]=engine.max_input_len
    [kv_cache_free_gpu_memory_fraction]=engine.kv_cache_free_gpu_memory_fraction
)
own=(output export_fmt tasks sparsity)
lm="tasks of text alone are gone; gqa asks about images"
bits="all linears get one format"
declare -A gone=(
    [auto_quantize_bits]=$bits [effective_bits]=$bits [lm_eval_tasks]=$lm [lm_eval_limit]=$lm
    [simple_eval_tasks]=$lm [num_samples]="$lm; evaluate.limit=N asks N questions"
)
layout="ranks are chosen so that they fit; parallel.tensor=N says it yourself"
declare -A ignored=([gpu_max_mem_percentage]=$layout) # with a value
declare -A flags=(
    [trust_remote_code]="nothing here runs code that came with a model"
    [use_seq_device_map]=$layout [low_memory_mode]=$layout [no-verbose]="nothing is verbose"
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
        [[ $word == ?*=* ]] || fail "$word is neither an option nor key=value of a recipe"
        overrides+=("$word")
    elif [[ -v flags[$name] ]]; then
        echo "--$name is ignored: ${flags[$name]}" >&2
    elif [[ -v gone[$name] ]]; then
        fail "--$name is gone: ${gone[$name]}"
    elif [[ -v key[$name] || -v ignored[$name] || " ${own[*]} " == *" $name "* ]]; then
        (($#)) || fail "--$name needs a value"
        [[ ! -v ignored[$name] ]] || echo "--$name is ignored: ${ignored[$name]}" >&2
        [[ -z $1 ]] || given[$name]=$1 # an empty one is none, as ever
        shift
    else
        known=$(printf -- '--%s\n' "${!key[@]}" "${own[@]}" "${!ignored[@]}" "${!flags[@]}" | sort)
        fail "unknown option $word; known: ${known//$'\n'/ }"
    fi
done

for name in model type quant; do
    [[ -n ${given[$name]:-} ]] || fail "--$name is missing"
done
[[ ${given[sparsity]:-dense} == dense ]] ||
    fail "--sparsity ${given[sparsity]} is gone: weights stay dense; leave it out"
case ${given[export_fmt]:=tensorrt_llm} in
    tensorrt_llm) target=trtllm tasks=build ;;
    hf) target=hf tasks=quant ;;
    *) fail "--export_fmt ${given[export_fmt]} is unknown; known: tensorrt_llm, hf" ;;
esac
case ${given[type]} in # images of any number of tokens, or of few
    phi | llava_next) input=4096 batch=4 ;;
    *) input=1024 batch=20 ;;
esac
case ${given[quant]} in
    int8_sq | int8_smoothquant) cache=none ;;
    *) cache=fp8 ;;
esac
[[ ${given[calib_batch_size]:-} != 0 ]] || unset 'given[calib_batch_size]' # 0: choose
: "${given[input]:=$input}" "${given[batch]:=$batch}" "${given[kv_cache_quant]:=$cache}"
: "${given[tp]:=1}" "${given[pp]:=1}" "${given[output]:=512}" "${given[tasks]:=$tasks}"
for name in input output; do
    [[ ${given[$name]} =~ ^[1-9][0-9]*$ ]] || fail "--$name ${given[$name]} is no number of tokens"
done

stages="import, observe, solve, export, verify" form=export data=
for task in ${given[tasks]//,/ }; do
    [[ $task =~ ^(quant|build|gqa)$ ]] || fail "--tasks $task: $lm; known: quant, build, gqa"
done
if [[ ,${given[tasks]}, == *,build,* ]]; then
    stages+=", build" form=engine
fi
if [[ ,${given[tasks]}, == *,gqa,* ]]; then
    stages+=", evaluate"
    for word in "${overrides[@]}"; do
        [[ $word != evaluate.data=* ]] || data=$word
    done
    [[ -n $data ]] || fail "--tasks gqa needs GQA: add evaluate.data=DIR, a folder with" \
        "testdev_balanced_questions.json and images/"
fi
[[ -n ${given[calib_dataset]:-} ]] || echo "calibrating on drawn scenes: --calib_dataset DIR" \
    "names a folder with questions in GQA's format and images/" >&2

name=$(basename "${given[model]}" | sed 's/[^0-9a-zA-Z-]/_/g')
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
