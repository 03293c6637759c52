"""Hugging Face exports have the names, shapes, dtypes and values of modelopt 0.47's export.

A small Llama is quantized and exported by modelopt. The same weights and amax values go through
this package's writer.
"""

import contextlib
import copy
import io
import json

import modelopt.torch.quantization as mtq
import pytest
import torch
from encoded_models import HF_FORMAT
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.unified_export_hf import _export_transformers_checkpoint
from random_llama import random_llama

from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.numerics import weight_amax
from nemo_vlm_ptq.parameter_map.entries import expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.targets.hf import tensors as hf
from nemo_vlm_ptq.targets.hf.config import config_files, quantization_block
from nemo_vlm_ptq.targets.writing.encode import encode_ends, encode_layer, kv_scales
from nemo_vlm_ptq.targets.writing.published import entry_tensors

DECODER = Decoder(
    hidden=128,
    ffn=256,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=100,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=64,
)
PARAMETER_MAP = llava.FAMILY.parameter_map(DECODER)
PREFIX = llava.FAMILY.decoder_prefix
GROUP_SIZE = 64
LORA = "weight_quantizer.svdquant_lora_"
KV_PRESETS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
# modelopt exports separate fp8 scales of these; servers that fuse them requantize the weights.
FUSED_BY_SERVERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
MAX_TIES = 4  # fp8 codes of a tensor in which w / scale and w * (448 / amax) round differently
# modelopt folds AWQ's scales into preceding modules except that of o_proj, which is compared.
CASES = [
    ("fp8", "none"),
    ("fp8", "fp8"),
    ("fp8_pc_pt", "none"),
    ("int4_awq", "none"),
    ("nvfp4", "none"),
    ("nvfp4", "nvfp4"),
    ("nvfp4_awq", "none"),
    ("nvfp4_svdquant", "none"),
    ("int8_wo", "none"),
    ("int4_wo", "fp8"),
]


def quant_config(fmt, kv_cache):
    """Return modelopt's preset of a format with the group size of this test."""
    config = copy.deepcopy(getattr(mtq, fmt.modelopt_preset))
    config["algorithm"] = "max"
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg") or {}
        for part in cfg if isinstance(cfg, list) else [cfg]:
            if "block_sizes" in part:
                part["block_sizes"][-1] = fmt.group(GROUP_SIZE)
    if kv_cache != "none":
        config["quant_cfg"] += copy.deepcopy(getattr(mtq, KV_PRESETS[kv_cache])["quant_cfg"])
    return config


def quantized_linears(model):
    """Return the quantized linears of the decoder's layers by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def add_scales(model, fmt):
    """Add random pre_quant_scale and low-rank branches, equal for linears with the same input."""
    columns = {name: linear.weight.shape[1] for name, linear in quantized_linears(model).items()}
    pre_quant_scale = {size: torch.rand(size) + 0.5 for size in set(columns.values())}
    lora_a = {size: torch.randn(fmt.low_rank, size) for size in columns.values()}
    for name, linear in quantized_linears(model).items():
        linear.input_quantizer._enable_pre_quant_scale = True
        linear.input_quantizer.pre_quant_scale = pre_quant_scale[columns[name]]
        if fmt.low_rank:
            lora_b = torch.randn(linear.weight.shape[0], fmt.low_rank)
            quantizer = linear.weight_quantizer
            quantizer.register_buffer("svdquant_lora_a", lora_a[columns[name]].clone())
            quantizer.register_buffer("svdquant_lora_b", lora_b)


def quantized_model(fmt, kv_cache):
    model = random_llama(DECODER, torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    with contextlib.redirect_stdout(io.StringIO()):
        model = mtq.quantize(model, quant_config(fmt, kv_cache), lambda model: model(ids))
    if fmt.uses_pre_quant_scale:
        add_scales(model, fmt)
    return model


def package_export(model, fmt, kv_cache):
    """Return tensors and quantization block that this package exports for modelopt's model."""
    entries = expand_layers(PARAMETER_MAP, range(DECODER.layers))
    state = {f"{PREFIX}{name}": tensor for name, tensor in model.state_dict().items()}
    modules = {f"{PREFIX}{name}": linear for name, linear in quantized_linears(model).items()}
    weights, scales, sizes = {}, {}, DECODER.sizes(1)
    for entry in entries:
        parts = [state[name] for name in entry.hf_names]
        weight = shard_tensor(entry.sharding, parts, sizes, 0, 1)
        weights[entry.megatron_name] = weight
        if entry.is_linear:
            linears = [modules[name.removesuffix(".weight")] for name in entry.hf_names]
            scales[entry.module_name] = linear_scales(entry, linears, weight, fmt)

    def read(names):
        return {name: weights[name].clone() for name in names}

    layer = encode_layer(PARAMETER_MAP, 0, read, scales, fmt, DECODER)
    ends = encode_ends(PARAMETER_MAP, read, DECODER)
    tensors = {}
    for encoded in (*layer.values(), *ends.values()):
        tensors |= entry_tensors(encoded, torch.float32, HF_FORMAT)
    kv = KV_CACHES.get(kv_cache)
    if kv is not None:
        attention = model.model.layers[0].self_attn
        quantizers = (attention.k_bmm_quantizer, attention.v_bmm_quantizer)
        layer_scales = kv_scales(*(quantizer.amax.float() for quantizer in quantizers), kv)
        tensors |= hf.kv_tensors(layer["linear_qkv"], layer_scales)
    block = quantization_block(fmt, GROUP_SIZE, ["lm_head", "model.embed_tokens"], kv)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, block


def linear_scales(entry, linears, weight, fmt):
    """Return LinearScales from modelopt's quantizers of an entry's parts."""
    input_amax = pre_quant_scale = a_RK = b_OR = None
    if fmt.activation not in (None, "fp8_token"):
        amaxes = [linear.input_quantizer.amax.float() for linear in linears]
        input_amax = torch.stack(amaxes).amax()
    if fmt.uses_pre_quant_scale:
        pre_quant_scale = linears[0].input_quantizer.pre_quant_scale
    if fmt.low_rank:
        a_RK = linears[0].weight_quantizer.svdquant_lora_a
        parts = [linear.weight_quantizer.svdquant_lora_b for linear in linears]
        b_OR = shard_tensor(entry.sharding, parts, DECODER.sizes(1), 0, 1)
    return LinearScales(
        weight_amax=weight_amax(weight, fmt.granularity, fmt.group(GROUP_SIZE)),
        input_amax=input_amax,
        pre_quant_scale=pre_quant_scale,
        low_rank_a=a_RK,
        low_rank_b=b_OR,
    )


@pytest.mark.parametrize(("name", "kv_cache"), CASES)
def test_export_equals_that_of_modelopt(name, kv_cache):
    fmt = FORMATS[name]
    model = quantized_model(fmt, kv_cache)
    actual, block = package_export(model, fmt, kv_cache)
    with contextlib.redirect_stdout(io.StringIO()):
        expected, config = _export_transformers_checkpoint(model, torch.float32)
    expected = {key.replace(LORA, "svdquant_lora_"): tensor for key, tensor in expected.items()}
    if fmt.uses_pre_quant_scale:
        actual, expected = (
            {key: tensor for key, tensor in tensors.items() if "o_proj" in key}
            for tensors in (actual, expected)
        )
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and actual[key].shape == tensor.shape, key
        skipped = name == "fp8" and key.split(".")[-2] in FUSED_BY_SERVERS
        assert skipped or equal_up_to_ties(actual[key], tensor), key
    check_configs(block, config, fmt)


def equal_up_to_ties(actual, expected):
    """Return whether tensors are equal, or fp8 codes of which a few differ by one."""
    if torch.equal(actual, expected) or actual.dtype != torch.float8_e4m3fn:
        return torch.equal(actual, expected)
    difference = (actual.view(torch.int8).int() - expected.view(torch.int8).int()).abs()
    return int(difference.amax()) == 1 and int(difference.sum()) <= MAX_TIES


def check_configs(block, config, fmt):
    expected = dict(config["quantization"])
    if fmt.weight == "int4" and not fmt.uses_pre_quant_scale:
        assert expected["pre_quant_scale"]  # although modelopt exports none
        expected["pre_quant_scale"] = False
    if fmt.low_rank:
        expected["lora_rank"] = fmt.low_rank  # as in modelopt's export of diffusion models
    assert block == expected
    converted = convert_hf_quant_config_format(config | {"quantization": expected})
    converted.pop("producer")  # the package that wrote the file
    actual = config_files({}, block)["config.json"]["quantization_config"]
    assert {key: actual[key] for key in converted} == json.loads(json.dumps(converted))
