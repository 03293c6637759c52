"""Every kind of damage that a folder alone can show is refused, by tensor and by what is expected.

Base: a small random Llama of 501 words, written for two tensor ranks with an fp8 KV cache.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from streams import write_trtllm
from test_contract import configure, stream

from nemo_vlm_ptq.targets.trtllm.contract import check_contract

LAYER = "transformer.layers.1."
FC, PROJ, QKV = f"{LAYER}mlp.fc.", f"{LAYER}mlp.proj.", f"{LAYER}attention.qkv."
KV = f"{LAYER}attention.kv_cache_scaling_factor"
NORM, EMBEDDING, HEAD = (
    f"{LAYER}input_layernorm.weight",
    "transformer.vocab_embedding.weight",
    "lm_head.weight",
)
SCALE, PREQUANT, GIVEN = (
    "weights_scaling_factor",
    "prequant_scaling_factor",
    "activation_scaling_factor",
)
NAN, INF = float("nan"), float("inf")


def change(folder, rank, edit):
    """Pass the tensors of a rank's file through a function that changes them in place."""
    path = folder / f"rank{rank}.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def refusal(folder, *expected):
    """The findings are just these; each is a pattern, `*` for anything."""
    found = check_contract(folder)
    patterns = [re.escape(one).replace(r"\*", ".*") for one in expected]
    assert len(found) == len(patterns), found
    for finding, pattern in zip(found, patterns, strict=True):
        assert re.fullmatch(pattern, finding), finding


def lose(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


def fill(name, value, place=0):
    return lambda tensors: tensors[name].view(-1)[place : place + 1].fill_(value)


def fill_byte(name, value):
    return lambda tensors: tensors[name].view(torch.uint8).view(-1)[:1].fill_(value)


# name: format, edit of the second rank's tensors, what is found in its file
TENSORS = {
    "a missing tensor": ("fp8", lose(f"{FC}weight"), f"{FC}weight is missing"),
    "a missing scale": ("nvfp4", lose(f"{FC}{SCALE}_2"), f"{FC}{SCALE}_2 is missing"),
    "a missing input scale": ("fp8", lose(FC + GIVEN), f"{FC}{GIVEN} is missing"),
    "a missing prequant scale": ("int8_sq", lose(FC + PREQUANT), f"{FC}{PREQUANT} is missing"),
    "a missing KV scale": ("fp8", lose(KV), f"{KV} is missing"),
    "a missing head": ("fp8", lose(HEAD), f"{HEAD} is missing"),
    "an extra tensor": ("fp8", lambda own: own.update(more=torch.ones(1)), "more is extra"),
    "a scale that the format has not": (
        "fp8",
        lambda own: own.update({FC + PREQUANT: torch.ones(512, dtype=torch.bfloat16)}),
        f"{FC}{PREQUANT} is extra",
    ),
    "a norm in float32": (
        "fp8", put(NORM, torch.Tensor.float), f"{NORM} has dtype F32, not BF16",
    ),
    "a scale in 16 bit": (
        "int8_sq", put(FC + SCALE, torch.Tensor.bfloat16), f"{FC}{SCALE} has dtype BF16, not F32",
    ),
    "a prequant scale in float32": (
        "int4_awq", put(FC + PREQUANT, torch.Tensor.float),
        f"{FC}{PREQUANT} has dtype F32, not BF16",
    ),
    "codes as 16 bit numbers": (
        "fp8", put(f"{FC}weight", torch.Tensor.bfloat16), f"{FC}weight has dtype BF16, not F8_E4M3",
    ),
    "codes that are not packed": (
        "int4_awq", put(f"{FC}weight", lambda own: own.repeat(2, 1)),
        f"{FC}weight has shape [256, 512], not [128, 512]",
    ),
    "a whole tensor for a share": (
        "fp8", put(f"{FC}weight", lambda own: own.view(torch.int8).repeat(2, 1).view(own.dtype)),
        f"{FC}weight has shape [512, 512], not [256, 512]",
    ),
    "a transposed weight": (
        "int8_sq", put(f"{PROJ}weight", torch.Tensor.t),
        f"{PROJ}weight has shape [256, 512], not [512, 256]",
    ),
    "transposed scales": (
        "int4_awq", put(FC + SCALE, torch.Tensor.t),
        f"{FC}{SCALE} has shape [4, 256], not [256, 4]",
    ),
    "one scale for a channel each": (
        "int8_sq", put(FC + SCALE, lambda own: own[:1]), f"{FC}{SCALE} has shape [1], not [256]",
    ),
    "a vocabulary that is not padded": (
        "fp8", put(HEAD, lambda own: own[:-1]), f"{HEAD} has shape [250, 512], not [251, 512]",
    ),
    "padding that is not zero": (
        "fp8", fill(EMBEDDING, 1.0, place=250 * 512),
        f"{EMBEDDING} must hold zeros from row 250 on, where the vocabulary of 501 ends",
    ),
    "a NaN in a scale": ("int4_awq", fill(FC + SCALE, NAN), f"{FC}{SCALE} holds NaN or Inf"),
    "an Inf in a scale": ("int8_sq", fill(FC + SCALE, INF), f"{FC}{SCALE} holds NaN or Inf"),
    "a scale of zero": (
        "int4_awq", fill(FC + SCALE, 0.0),
        f"{FC}{SCALE} holds the scale 0, every scale must be above 0",
    ),
    "a negative scale": (
        "w4a8_awq", fill(FC + SCALE, -0.5),
        f"{FC}{SCALE} holds the scale -0.5, every scale must be above 0",
    ),
    "a block scale of zero": (
        "nvfp4", fill_byte(FC + SCALE, 0),
        f"{FC}{SCALE} holds the scale 0, every scale must be above 0",
    ),
    "a block scale that is NaN": ("nvfp4", fill_byte(FC + SCALE, 0x7F), f"{FC}{SCALE} holds NaN"),
    "an fp8 code that is NaN": ("fp8", fill_byte(f"{FC}weight", 0xFF), f"{FC}weight holds NaN"),
    "a NaN in the head": ("fp8", fill(HEAD, NAN), f"{HEAD} holds NaN or Inf"),
    "an Inf in a 16 bit weight": (None, fill(f"{FC}weight", INF), f"{FC}weight holds NaN or Inf"),
    "codes that nobody wrote": (
        "int4_awq", put(f"{FC}weight", torch.zeros_like), f"{FC}weight holds nothing but zeros",
    ),
    "another norm": ("fp8", fill(NORM, 3.0), f"{NORM} differs from * all must hold the same"),
    "another input scale": (
        "fp8", put(FC + GIVEN, lambda own: own * 2), f"{FC}{GIVEN} differs from *",
    ),
    "another prequant scale": ("int8_sq", fill(FC + PREQUANT, 3.0), f"{FC}{PREQUANT} differs *"),
    "another KV scale": ("fp8", put(KV, lambda own: own * 2), f"{KV} differs from *"),
    "another second scale": (
        "w4a8_awq", put(f"{PROJ}{SCALE}_2", lambda own: own * 2), f"{PROJ}{SCALE}_2 differs from *",
    ),
    "other channel scales of a row parallel linear": (
        "int8_sq", put(PROJ + SCALE, lambda own: own * 2), f"{PROJ}{SCALE} differs from *",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", TENSORS)
def test_a_damaged_tensor_is_refused(tmp_path, damage):
    name, edit, expected = TENSORS[damage]
    write_trtllm(tmp_path / "cut", stream(name), (2, 1), "fp8")
    assert check_contract(tmp_path / "cut") == []
    change(tmp_path / "cut", 1, edit)
    refusal(tmp_path / "cut", f"rank1.safetensors: {expected}")


QUANTIZATION = "quantization"
# name: format, edit of config.json, finding
CONFIGS = {
    "a wrong world size": (
        "fp8", {"mapping": {"world_size": 3, "tp_size": 2, "pp_size": 1}},
        "mapping.world_size is not tp_size * pp_size = 2",
    ),
    "a mapping of too few keys": (
        "fp8", {"mapping": {"tp_size": 2, "pp_size": 1}},
        "mapping.world_size is missing or not portable",
    ),
    "a mapping with a rank": (
        "fp8", {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1, "rank": 1}},
        "mapping.rank is missing or not portable",
    ),
    "a tensor size that does not divide the heads": (
        "fp8", {"num_attention_heads": 15, "num_key_value_heads": 5},
        "tp_size 2 does not divide num_attention_heads 15",
        "tp_size 2 does not share out num_key_value_heads 5",
    ),
    "KV heads that the heads do not share": (
        "fp8", {"num_key_value_heads": 6}, "num_key_value_heads does not divide *",
    ),
    "a size that is none": ("fp8", {"vocab_size": "501"}, "vocab_size is '501', not a number *"),
    "an unknown algorithm": (
        "fp8", {QUANTIZATION: {"quant_algo": "FP9"}}, "quant_algo 'FP9' is not known; known: *",
    ),
    "a key that TensorRT-LLM refuses": (
        "fp8", {QUANTIZATION: {"bits": 8}}, "quantization.bits is refused by TensorRT-LLM",
    ),
    "a group size of another format": (
        "w4a8_awq", {QUANTIZATION: {"group_size": 64}},
        "group_size of W4A8_AWQ is 64, it must be 128",
    ),
    "no group size": (
        "int4_awq", {QUANTIZATION: {"group_size": None}},
        "group_size of W4A16_AWQ is None, it must be 64 or 128",
    ),
    "prequant scales that would be dropped": (
        "int4_awq", {QUANTIZATION: {"pre_quant_scale": False}},
        "pre_quant_scale must be true, or scales are dropped",
    ),
    "zero points that are not there": (
        "int4_awq", {QUANTIZATION: {"has_zero_point": True}}, "has_zero_point asks for tensors *",
    ),
    "a head that counts as quantized": (
        "fp8", {QUANTIZATION: {"exclude_modules": []}}, "exclude_modules must name lm_head: *",
    ),
    "no list of excluded modules": (
        "fp8", {QUANTIZATION: {"exclude_modules": None}},
        "exclude_modules must be a list that names lm_head",
    ),
    "features that the loader would pad": (
        "int4_awq", {"intermediate_size": 384},
        "intermediate_size 384 is no multiple of 256; linears of W4A16_AWQ are padded *",
    ),
    "a group that is cut": (
        "nvfp4", {"intermediate_size": 528}, "intermediate_size 528 is no multiple of 32: *",
    ),
    "another activation": ("fp8", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not known; *"),
    "another model": (
        "fp8", {"architecture": "LlavaForCausalLM"}, "architecture 'LlavaForCausalLM' is not *",
    ),
    "biases": ("fp8", {"attn_bias": True}, "attn_bias asks for tensors that are not known here"),
    "experts": ("fp8", {"moe": {"num_experts": 8}}, "moe asks for tensors *"),
    "logits in bfloat16": ("fp8", {"logits_dtype": "bfloat16"}, "logits_dtype 'bfloat16' is not *"),
    "a rotary base that is none": ("fp8", {"rotary_base": 0}, "rotary_base is 0"),
    "rotary scaling of no type": ("fp8", {"rotary_scaling": {"factor": 2}}, "rotary_scaling has *"),
}  # fmt: skip


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_config_is_refused(tmp_path, damage):
    name, edit, *expected = CONFIGS[damage]

    def apply(config):
        block = config[QUANTIZATION] | edit.get(QUANTIZATION, {})
        config.update(edit | {QUANTIZATION: block})

    write_trtllm(tmp_path / "cut", stream(name), (2, 1), "fp8")
    configure(tmp_path / "cut", apply)
    refusal(tmp_path / "cut", *(f"config.json: {one}" for one in expected))
