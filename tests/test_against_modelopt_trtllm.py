"""modelopt 0.47's TensorRT-LLM export passes the contract and equals this package's export.

A small Llama is quantized and exported by modelopt on the CPU. The same weights and amax values go
through this package's writer.
"""

import contextlib
import copy
import functools
import io

import modelopt.torch.quantization as mtq
import pytest
import torch
from encoded_models import EncodedModel, write_trtllm
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from random_llama import random_llama
from safetensors.torch import load_file
from test_contract import CASES, DECODER, EMBEDDING, FORMAT_NAMES, HEAD

from nemo_vlm_ptq.calibrate.solve.layer import weight_names
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.numerics import nudge_off_ties, weight_amax
from nemo_vlm_ptq.parameter_map.entries import expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.targets.trtllm.contract import check_contract, run_contract_checks
from nemo_vlm_ptq.targets.trtllm.tensors import kv_tensors
from nemo_vlm_ptq.targets.writing.encode import encode_ends, encode_layer, kv_scales
from nemo_vlm_ptq.workdir.store import read_json

DTYPE = torch.bfloat16
GROUP_SIZE = 128
AWQ_VOCAB = 512  # to which modelopt pads the vocabulary for AWQ
# Second scales of gate and up, of which this package writes the larger for both.
SHARED_SCALES = ("mlp.fc.weights_scaling_factor_2", "mlp.gate.weights_scaling_factor_2")
INT8_CACHE = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8}, "enable": True}
NO_QUANTIZATION = {"quantizer_name": "*", "enable": False}
PARAMETER_MAP = llava.FAMILY.parameter_map(DECODER)
PREFIX = llava.FAMILY.decoder_prefix
KV_SCALE = "attention.kv_cache_scaling_factor"


def quantized_linears(model):
    """Return the quantized linears of the decoder's layers by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def nudge_weights_off_ties(model, fmt):
    """Move weights off the midpoints between codes, as the package does before encoding."""
    for entry in expand_layers(PARAMETER_MAP, range(DECODER.layers)):
        if not entry.is_linear:
            continue
        names = [name.removeprefix(PREFIX).removesuffix(".weight") for name in entry.hf_names]
        weights = [model.get_submodule(name).weight for name in names]
        merged = torch.cat(weights)
        amax = weight_amax(merged, fmt.granularity, fmt.group(GROUP_SIZE))
        nudged = nudge_off_ties(merged, amax, fmt.weight).split([len(one) for one in weights])
        for weight, part in zip(weights, nudged, strict=True):
            weight.copy_(part)


@functools.cache
def quantized_model(name, kv_cache):
    """Return a model quantized by modelopt, with a random pre_quant_scale."""
    model, fmt = random_llama(DECODER, DTYPE), FORMATS.get(name)
    config = {"quant_cfg": [NO_QUANTIZATION]}
    if fmt:
        config = copy.deepcopy(getattr(mtq, fmt.modelopt_preset))
    config["algorithm"] = "max"
    if fmt:
        nudge_weights_off_ties(model, fmt)
    if kv_cache == "fp8":
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    if kv_cache == "int8":
        config["quant_cfg"].append(INT8_CACHE)
    if fmt or kv_cache != "none":
        with contextlib.redirect_stdout(io.StringIO()):
            ids = torch.arange(40).reshape(2, 20)
            model = mtq.quantize(model, config, lambda model: model(ids))
    if fmt and fmt.uses_pre_quant_scale:
        pre_quant_scale = torch.rand(DECODER.hidden) + 0.5
        for linear in quantized_linears(model).values():
            linear.input_quantizer._enable_pre_quant_scale = True
            linear.input_quantizer.pre_quant_scale = pre_quant_scale.to(DTYPE)
    return model


def write_by_modelopt(folder, model, layout):
    """Export a copy of a model with modelopt for a serving layout (tensor, pipeline)."""
    with contextlib.redirect_stdout(io.StringIO()):
        export_tensorrt_llm_checkpoint(copy.deepcopy(model), "llama", DTYPE, folder, *layout)


def write_by_package(folder, name, layout):
    """Export the same model with this package."""
    fmt, model = FORMATS.get(name), quantized_model(name, "none")
    state = {f"{PREFIX}{key}": tensor for key, tensor in model.state_dict().items()}
    modules = {f"{PREFIX}{key}.weight": one for key, one in quantized_linears(model).items()}
    entries = expand_layers(PARAMETER_MAP, range(DECODER.layers))
    sizes = DECODER.sizes(64)
    weights, scales = {}, {}
    for entry in entries:
        parts = [state[name] for name in entry.hf_names]
        weight = shard_tensor(entry.sharding, parts, sizes, 0, 1)
        weights[entry.megatron_name] = weight
        if entry.is_linear and fmt:
            linears = [modules[name] for name in entry.hf_names]
            scales[entry.megatron_name] = linear_scales(linears, weight, fmt)

    def read(names):
        return {key: weights[key] for key in names}

    def layer(index, shard):
        layer_scales = {linear: scales.get(key) for linear, key in weight_names(index).items()}
        return encode_layer(PARAMETER_MAP, index, read, layer_scales, fmt, DECODER, shard=shard)

    model = EncodedModel(
        family="llava",
        fmt=fmt,
        layers=[],
        ends=functools.partial(encode_ends, PARAMETER_MAP, read, DECODER),
        decoder=DECODER,
        group_size=GROUP_SIZE,
        layer=layer,
    )
    write_trtllm(folder, model, layout)


def linear_scales(linears, weight, fmt):
    """Return LinearScales from modelopt's quantizers of an entry's parts."""
    second_amax = input_amax = pre_quant_scale = None
    if fmt.second_weight is not None:
        second_amax = weight.float().abs().amax()
    if fmt.activation is not None:
        amaxes = [linear.input_quantizer.amax.float() for linear in linears]
        input_amax = torch.stack(amaxes).amax()
    if fmt.uses_pre_quant_scale:
        pre_quant_scale = linears[0].input_quantizer.pre_quant_scale.float()
    return LinearScales(
        weight_amax=weight_amax(weight, fmt.granularity, fmt.group(GROUP_SIZE)),
        weight_amax_2=second_amax,
        input_amax=input_amax,
        pre_quant_scale=pre_quant_scale,
    )


def read_ranks(folder):
    return [load_file(path) for path in sorted(folder.glob("rank*"))]


@pytest.mark.parametrize(("name", "kv_cache"), CASES)
@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_export_of_modelopt_passes_the_contract(tmp_path, name, kv_cache, layout):
    write_by_modelopt(tmp_path / "llm", quantized_model(name, kv_cache), layout)
    assert check_contract(tmp_path / "llm") == []


@pytest.mark.parametrize("name", [None, "fp8", "nvfp4"])
def test_kv_heads_replicated_by_modelopt_pass_the_contract(tmp_path, name):
    write_by_modelopt(tmp_path / "llm", quantized_model(name, "none"), (16, 1))
    assert check_contract(tmp_path / "llm") == []


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_tensors_equal_those_of_modelopt(tmp_path, name):
    """Except the vocabulary, which modelopt pads for AWQ, and the second scales of gate and up.

    This package writes the larger of the two scales for both; the codes are equal.
    """
    write_by_modelopt(tmp_path / "modelopt", quantized_model(name, "none"), (2, 1))
    write_by_package(tmp_path / "package", name, (2, 1))
    ranks = [read_ranks(tmp_path / writer) for writer in ("package", "modelopt")]
    for actual, expected in zip(*ranks, strict=True):
        assert set(actual) == set(expected)
        for key, tensor in actual.items():
            other = expected[key].reshape(expected[key].shape or (1,))
            assert tensor.dtype == other.dtype, key
            if key.endswith(SHARED_SCALES):
                module = key.split(".")[-2]
                pair = [expected[key.replace(module, part)] for part in ("fc", "gate")]
                assert tensor == max(pair)
                continue
            if key in (EMBEDDING, HEAD) and name in ("int4_awq", "w4a8_awq"):
                assert len(other) == AWQ_VOCAB // 2
                continue
            assert tensor.shape == other.shape, key
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), key


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
def test_modelopt_pads_the_vocabulary_for_awq(tmp_path, name):
    """vocab_size includes the padding, so ids of image tokens start from another number."""
    write_by_modelopt(tmp_path / "llm", quantized_model(name, "none"), (2, 1))
    assert read_json(tmp_path / "llm" / "config.json")["vocab_size"] == AWQ_VOCAB
    for key in (EMBEDDING, HEAD):
        padded = torch.cat([tensors[key] for tensors in read_ranks(tmp_path / "llm")])
        assert len(padded) == AWQ_VOCAB and not padded[DECODER.vocab :].any()


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_modelopt_raises_fp8_kv_scales_to_one(tmp_path, kv_cache):
    """This package keeps amax / 448, so that small keys and values do not round to zero."""
    model = quantized_model("fp8", kv_cache)
    write_by_modelopt(tmp_path / "llm", model, (1, 1))
    (tensors,) = read_ranks(tmp_path / "llm")
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        quantizers = (attention.k_bmm_quantizer, attention.v_bmm_quantizer)
        amaxes = [quantizer.amax.float() for quantizer in quantizers]
        actual = kv_tensors(kv_scales(*amaxes, KV_CACHES[kv_cache]))[KV_SCALE]
        expected = tensors[f"transformer.layers.{index}.{KV_SCALE}"]
        assert actual < 0.1
        assert torch.equal(expected, torch.ones(1) if kv_cache == "fp8" else actual)


def test_summary_reports_the_rotary_base_that_modelopt_omits(tmp_path):
    """modelopt reads rope_theta, which transformers 5 has in rope_parameters."""
    model = random_llama(
        DECODER, DTYPE, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    write_by_modelopt(tmp_path / "llm", model, (1, 1))
    assert "rotary_base" not in read_json(tmp_path / "llm" / "config.json")
    config_check = run_contract_checks(tmp_path / "llm")[0]
    assert config_check.findings == []
    assert config_check.about.endswith("rotary_base is missing, the loader uses 10000")


def test_modelopt_does_not_replicate_kv_heads_in_int8(tmp_path):
    model = quantized_model("int8_sq", "none")
    with pytest.raises(NotImplementedError, match="Duplicating KV heads"):
        write_by_modelopt(tmp_path / "llm", model, (16, 1))
