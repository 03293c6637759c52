"""Names, shapes, dtypes and values of Hugging Face exports are those that modelopt 0.47 writes.

A small Llama is quantized by modelopt and exported by modelopt; the same weights and the same
largest activations go through our stream.
"""

import contextlib
import copy
import io
import json

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.unified_export_hf import _export_transformers_checkpoint
from random_llama import random_llama

from nemo_vlm_ptq.calibrate.solve.scales import LinearScales
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.numerics import weight_amax
from nemo_vlm_ptq.parameter_map.entries import expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.targets.hf import tensors as hf
from nemo_vlm_ptq.targets.writing.encode import encode_ends, encode_layer, kv_scales

DECODER = Decoder(128, 256, 1, 4, 2, 32, 100, 1e-5, 1e4, 64)
GROUP = 64
LORA = "weight_quantizer.svdquant_lora_"
KV_PRESETS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
# In fp8 modelopt leaves each of these its own scale, and readers that merge them round once more.
MERGED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
TIES = 4  # codes of a tensor: w / scale is not quite w * (448 / amax)
# modelopt folds AWQ's scales of all but o into what comes before, so AWQ is compared on o alone.
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


def preset(fmt, kv):
    config = copy.deepcopy(getattr(mtq, fmt.modelopt_preset))
    config["algorithm"] = "max"
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg") or {}
        for part in cfg if isinstance(cfg, list) else [cfg]:
            if "block_sizes" in part:
                part["block_sizes"][-1] = fmt.group(GROUP)
    if kv != "none":
        config["quant_cfg"] += copy.deepcopy(getattr(mtq, KV_PRESETS[kv])["quant_cfg"])
    return config


def linears(model):
    """Name -> quantized linear of the decoder's layers."""
    return {name: one for name, one in model.named_modules() if name.endswith("_proj")}


def add_scales(model, fmt):
    """A prequant scale and a branch for each linear, as if searched; inputs share them."""
    width = {name: one.weight.shape[1] for name, one in linears(model).items()}
    pre_quant_scale = {size: torch.rand(size) + 0.5 for size in set(width.values())}
    down = {size: torch.randn(fmt.low_rank, size) for size in width.values()}
    for name, one in linears(model).items():
        one.input_quantizer._enable_pre_quant_scale = True
        one.input_quantizer.pre_quant_scale = pre_quant_scale[width[name]]
        if fmt.low_rank:
            up = torch.randn(one.weight.shape[0], fmt.low_rank)
            one.weight_quantizer.register_buffer("svdquant_lora_a", down[width[name]].clone())
            one.weight_quantizer.register_buffer("svdquant_lora_b", up)


def quantized(fmt, kv):
    model = random_llama(DECODER, torch.float32)
    with contextlib.redirect_stdout(io.StringIO()):
        model = mtq.quantize(
            model, preset(fmt, kv), lambda model: model(torch.arange(40).reshape(2, 20))
        )
    if fmt.pre_quant_scale:
        add_scales(model, fmt)
    return model


def ours(model, fmt, kv):
    """(tensors, quantization block) of what our stream makes of a model of modelopt's."""
    rows = expand_layers(llava.FAMILY.parameter_map, range(DECODER.layers))
    state = {f"{llava.DECODER_PREFIX}{name}": one for name, one in model.state_dict().items()}
    modules = {f"{llava.DECODER_PREFIX}{name}": one for name, one in linears(model).items()}
    whole, scales, sizes = {}, {}, DECODER.sizes(1)
    for row in rows:
        whole[row.megatron_name] = shard_tensor(
            row.sharding, [state[name] for name in row.hf_names], sizes, 0, 1
        )
        if row.is_linear:
            own = [modules[name.removesuffix(".weight")] for name in row.hf_names]
            scales[row.module_name] = ours_of(row, own, whole[row.megatron_name], fmt)

    def read(names):
        return {name: whole[name].clone() for name in names}

    layer = encode_layer(llava.FAMILY.parameter_map, 0, read, scales, fmt, DECODER)
    tensors = {}
    for piece in (
        *layer.values(),
        *encode_ends(llava.FAMILY.parameter_map, read, DECODER).values(),
    ):
        tensors |= hf.published_tensors(piece, torch.float32)
    row = KV_CACHES.get(kv)
    if row is not None:
        attention = model.model.layers[0].self_attn
        found = (attention.k_bmm_quantizer, attention.v_bmm_quantizer)
        tensors |= hf.kv_tensors(
            layer["linear_qkv"], kv_scales(*(one.amax.float() for one in found), row)
        )
    block = hf.quantization_block(fmt, GROUP, ["lm_head", "model.embed_tokens"], row)
    return {
        name.removeprefix(llava.DECODER_PREFIX): tensor for name, tensor in tensors.items()
    }, block


def ours_of(row, modules, weight, fmt):
    """LinearScales from modelopt's quantizers of the parts of a row."""
    given = pre_quant_scale = down = up = None
    if fmt.activation not in (None, "fp8_token"):
        given = torch.stack([one.input_quantizer.amax.float() for one in modules]).amax()
    if fmt.pre_quant_scale:
        pre_quant_scale = modules[0].input_quantizer.pre_quant_scale
    if fmt.low_rank:
        down = modules[0].weight_quantizer.svdquant_lora_a
        ups = [one.weight_quantizer.svdquant_lora_b for one in modules]
        up = shard_tensor(row.sharding, ups, DECODER.sizes(1), 0, 1)
    amax = weight_amax(weight, fmt.granularity, fmt.group(GROUP))
    return LinearScales(amax, None, given, pre_quant_scale, down, up)


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_an_export_is_what_modelopt_writes(name, kv):
    fmt = FORMATS[name]
    model = quantized(fmt, kv)
    mine, block = ours(model, fmt, kv)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs, config = _export_transformers_checkpoint(model, torch.float32)
    theirs = {key.replace(LORA, "svdquant_lora_"): one for key, one in theirs.items()}
    if fmt.pre_quant_scale:
        mine, theirs = (
            {key: one for key, one in tensors.items() if "o_proj" in key}
            for tensors in (mine, theirs)
        )
    assert set(mine) == set(theirs)
    for key, tensor in theirs.items():
        assert mine[key].dtype == tensor.dtype and mine[key].shape == tensor.shape, key
        assert (name == "fp8" and key.split(".")[-2] in MERGED) or same(mine[key], tensor), key
    check_configs(block, config, fmt)


def same(mine, theirs):
    """Equal, or fp8 codes of which a few lie next to each other."""
    if torch.equal(mine, theirs) or mine.dtype != torch.float8_e4m3fn:
        return torch.equal(mine, theirs)
    apart = (mine.view(torch.int8).int() - theirs.view(torch.int8).int()).abs()
    return int(apart.amax()) == 1 and int(apart.sum()) <= TIES


def check_configs(block, config, fmt):
    expected = dict(config["quantization"])
    if fmt.weight == "int4" and not fmt.pre_quant_scale:
        assert expected["pre_quant_scale"]  # modelopt says so, and writes none
        expected["pre_quant_scale"] = False
    if fmt.low_rank:
        expected["lora_rank"] = fmt.low_rank  # as modelopt's export of diffusion models has it
    assert block == expected
    whole = convert_hf_quant_config_format(config | {"quantization": expected})
    mine = hf.config_files({}, block)["config.json"]["quantization_config"]
    assert {key: mine[key] for key in whole} == json.loads(json.dumps(whole))
