"""What modelopt 0.47 writes for TensorRT-LLM keeps the contract, and is what we write.

A small Llama is quantized and exported by modelopt, on the CPU; the same weights and the same
largest activations go through our stream.
"""

import contextlib
import copy
import functools
import io

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from random_llama import random_llama
from safetensors.torch import load_file
from streams import Stream, write_trtllm
from test_contract import CASES, DECODER, NAMES

from nemo_vlm_ptq.calibrate.solve.layer import weight_names
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.numerics import nudge_off_ties, weight_amax
from nemo_vlm_ptq.parameter_map.entries import expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.targets.trtllm.contract import check_contract, contract_checks
from nemo_vlm_ptq.targets.trtllm.tensors import kv_tensors
from nemo_vlm_ptq.targets.writing.encode import encode_ends, encode_layer, kv_scales
from nemo_vlm_ptq.workdir.store import read_json

DTYPE = torch.bfloat16
GROUP = 128
PADDED = 512  # the vocabulary as modelopt has it for AWQ
ENDS = ("transformer.vocab_embedding.weight", "lm_head.weight")
ONE_OF_TWO = ("mlp.fc.weights_scaling_factor_2", "mlp.gate.weights_scaling_factor_2")
INT8_CACHE = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8}, "enable": True}
NOTHING = {"quantizer_name": "*", "enable": False}
ROWS = llava.FAMILY.parameter_map


def linears(model):
    """Name -> quantized linear of the decoder's layers."""
    return {name: one for name, one in model.named_modules() if name.endswith("_proj")}


def leave_ties(model, fmt):
    """Move weights that lie half way between two codes, as ours are before they are packed."""
    for row in expand_layers(ROWS, range(DECODER.layers)):
        if not row.is_linear:
            continue
        names = [
            name.removeprefix(llava.DECODER_PREFIX).removesuffix(".weight") for name in row.hf_names
        ]
        weights = [model.get_submodule(name).weight for name in names]
        whole = torch.cat(weights)
        amax = weight_amax(whole, fmt.granularity, fmt.group(GROUP))
        moved = nudge_off_ties(whole, amax, fmt.weight).split([len(one) for one in weights])
        for weight, part in zip(weights, moved, strict=True):
            weight.copy_(part)


@functools.cache
def quantized(name, kv):
    """modelopt's model in a format, scales in front of the linears as if searched for."""
    model, fmt = random_llama(DECODER, DTYPE), FORMATS.get(name)
    config = copy.deepcopy(getattr(mtq, fmt.modelopt_preset)) if fmt else {"quant_cfg": [NOTHING]}
    config["algorithm"] = "max"
    if fmt:
        leave_ties(model, fmt)
    if kv == "fp8":
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    if kv == "int8":
        config["quant_cfg"].append(INT8_CACHE)
    if fmt or kv != "none":
        with contextlib.redirect_stdout(io.StringIO()):
            ids = torch.arange(40).reshape(2, 20)
            model = mtq.quantize(model, config, lambda model: model(ids))
    if fmt and fmt.pre_quant_scale:
        pre_quant_scale = torch.rand(DECODER.hidden) + 0.5
        for one in linears(model).values():
            one.input_quantizer._enable_pre_quant_scale = True
            one.input_quantizer.pre_quant_scale = pre_quant_scale.to(DTYPE)
    return model


def modelopt_writes(folder, model, cut):
    """A checkpoint of a model, tensor x pipeline; the model is left as it is."""
    with contextlib.redirect_stdout(io.StringIO()):
        export_tensorrt_llm_checkpoint(copy.deepcopy(model), "llama", DTYPE, folder, *cut)


def we_write(folder, name, cut):
    """The same model through our stream."""
    fmt, model = FORMATS.get(name), quantized(name, "none")
    state = {f"{llava.DECODER_PREFIX}{key}": one for key, one in model.state_dict().items()}
    modules = {f"{llava.DECODER_PREFIX}{key}.weight": one for key, one in linears(model).items()}
    rows = expand_layers(ROWS, range(DECODER.layers))
    sizes = DECODER.sizes(64)
    whole = {
        row.megatron_name: shard_tensor(row.sharding, [state[n] for n in row.hf_names], sizes, 0, 1)
        for row in rows
    }
    scales = {
        row.megatron_name: scales_of(
            [modules[n] for n in row.hf_names], whole[row.megatron_name], fmt
        )
        for row in rows
        if row.is_linear and fmt
    }

    def read(names):
        return {key: whole[key] for key in names}

    def layer(index, shard):
        own = {linear: scales.get(key) for linear, key in weight_names(index).items()}
        return encode_layer(ROWS, index, read, own, fmt, DECODER, shard=shard)

    ends = functools.partial(encode_ends, ROWS, read, DECODER)
    write_trtllm(folder, Stream("llava", fmt, [], ends, DECODER, GROUP, layer), cut)


def scales_of(modules, weight, fmt):
    """LinearScales from modelopt's quantizers of the parts of a row."""
    given = None
    if fmt.activation is not None:
        given = torch.stack([one.input_quantizer.amax.float() for one in modules]).amax()
    return LinearScales(
        weight_amax(weight, fmt.granularity, fmt.group(GROUP)),
        None if fmt.second_weight is None else weight.float().abs().amax(),
        given,
        modules[0].input_quantizer.pre_quant_scale.float() if fmt.pre_quant_scale else None,
        None,
        None,
    )


def ranks_of(folder):
    return [load_file(path) for path in sorted(folder.glob("rank*"))]


@pytest.mark.parametrize(("name", "kv"), CASES)
@pytest.mark.parametrize("cut", [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_what_modelopt_writes_keeps_the_contract(tmp_path, name, kv, cut):
    modelopt_writes(tmp_path / "cut", quantized(name, kv), cut)
    assert check_contract(tmp_path / "cut") == []


@pytest.mark.parametrize("name", [None, "fp8", "nvfp4"])
def test_kv_heads_that_modelopt_repeats_keep_the_contract(tmp_path, name):
    modelopt_writes(tmp_path / "cut", quantized(name, "none"), (16, 1))
    assert check_contract(tmp_path / "cut") == []


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_one_that_modelopt_writes(tmp_path, name):
    """But for the vocabulary, which modelopt pads for AWQ, and the second scales of gate and up.

    Those are one in ours, the larger; the codes under them are the same.
    """
    modelopt_writes(tmp_path / "theirs", quantized(name, "none"), (2, 1))
    we_write(tmp_path / "ours", name, (2, 1))
    ranks = [ranks_of(tmp_path / who) for who in ("ours", "theirs")]
    for mine, theirs in zip(*ranks, strict=True):
        assert set(mine) == set(theirs)
        for key, one in mine.items():
            other = theirs[key].reshape(theirs[key].shape or (1,))
            assert one.dtype == other.dtype, key
            if key.endswith(ONE_OF_TWO):
                pair = [theirs[key.replace(key.split(".")[-2], part)] for part in ("fc", "gate")]
                assert one == max(pair)
                continue
            if key in ENDS and name in ("int4_awq", "w4a8_awq"):
                assert len(other) == PADDED // 2
                continue
            assert one.shape == other.shape, key
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), key


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
def test_modelopt_pads_the_vocabulary_for_awq_and_says_so(tmp_path, name):
    """Readers that count image tokens from vocab_size on then count from another number."""
    modelopt_writes(tmp_path / "cut", quantized(name, "none"), (2, 1))
    assert read_json(tmp_path / "cut" / "config.json")["vocab_size"] == PADDED
    for key in ENDS:
        whole = torch.cat([rank[key] for rank in ranks_of(tmp_path / "cut")])
        assert len(whole) == PADDED and not whole[DECODER.vocab :].any()


@pytest.mark.parametrize("kv", ["fp8", "int8"])
def test_modelopt_raises_the_scales_of_an_fp8_cache_to_one(tmp_path, kv):
    """Ours are what was seen, so that small keys and values do not vanish; in int8 both are."""
    model = quantized("fp8", kv)
    modelopt_writes(tmp_path / "cut", model, (1, 1))
    (found,) = ranks_of(tmp_path / "cut")
    for index, layer in enumerate(model.model.layers):
        own = layer.self_attn
        seen = [one.amax.float() for one in (own.k_bmm_quantizer, own.v_bmm_quantizer)]
        ours = kv_tensors(kv_scales(*seen, KV_CACHES[kv]))["attention.kv_cache_scaling_factor"]
        theirs = found[f"transformer.layers.{index}.attention.kv_cache_scaling_factor"]
        assert ours < 0.1
        assert torch.equal(theirs, torch.ones(1) if kv == "fp8" else ours)


def test_modelopt_loses_the_rotary_base_and_the_check_says_what_the_loader_takes(tmp_path):
    """It looks for rope_theta where transformers 5 no longer has it."""
    model = random_llama(
        DECODER, DTYPE, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    modelopt_writes(tmp_path / "cut", model, (1, 1))
    assert "rotary_base" not in read_json(tmp_path / "cut" / "config.json")
    first = contract_checks(tmp_path / "cut")[0]
    assert first.findings == [] and first.about.endswith("rotary_base is not given: 10000")


def test_modelopt_repeats_no_kv_heads_in_int8(tmp_path):
    model = quantized("int8_sq", "none")
    with pytest.raises(NotImplementedError, match="Duplicating KV heads"):
        modelopt_writes(tmp_path / "cut", model, (16, 1))
