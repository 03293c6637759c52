"""Damage that a TensorRT-LLM checkpoint's folder shows is reported, with tensor and expectation.

The undamaged checkpoint is a small random Llama with a vocabulary of 501, for two tensor-parallel
ranks, with an fp8 KV cache.
"""

import re

import pytest
import torch
from encoded_models import write_trtllm
from safetensors.torch import load_file, save_file
from test_contract import EMBEDDING, HEAD, edit_config, encoded_model

from nemo_vlm_ptq.targets.trtllm.contract import check_contract

LAYER = "transformer.layers.1."
FC, PROJ, QKV = f"{LAYER}mlp.fc.", f"{LAYER}mlp.proj.", f"{LAYER}attention.qkv."
KV_SCALE = f"{LAYER}attention.kv_cache_scaling_factor"
NORM = f"{LAYER}input_layernorm.weight"
SCALE, PRE_QUANT_SCALE, INPUT_SCALE = (
    "weights_scaling_factor",
    "prequant_scaling_factor",
    "activation_scaling_factor",
)
NAN, INF = float("nan"), float("inf")
REPLICATED = "is replicated and must equal that of the first tensor-parallel rank"


def edit_rank(folder, rank, edit):
    """Apply a function that edits the tensors of a rank file in place."""
    path = folder / f"rank{rank}.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def assert_findings(folder, *expected):
    """Check that the findings match these patterns in order; `*` matches anything."""
    found = check_contract(folder)
    patterns = [re.escape(pattern).replace(r"\*", ".*") for pattern in expected]
    assert len(found) == len(patterns), found
    for finding, pattern in zip(found, patterns, strict=True):
        assert re.fullmatch(pattern, finding), finding


def remove(name):
    return lambda tensors: tensors.pop(name)


def replace(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


def fill(name, value, index=0):
    return lambda tensors: tensors[name].view(-1)[index : index + 1].fill_(value)


def fill_byte(name, value):
    return lambda tensors: tensors[name].view(torch.uint8).view(-1)[:1].fill_(value)


# case: format, edit of the second rank's tensors, finding in its file
TENSOR_CASES = {
    "weight removed": ("fp8", remove(f"{FC}weight"), f"tensor {FC}weight is missing"),
    "second scale removed": (
        "nvfp4", remove(f"{FC}{SCALE}_2"), f"tensor {FC}{SCALE}_2 is missing",
    ),
    "input scale removed": (
        "fp8", remove(FC + INPUT_SCALE), f"tensor {FC}{INPUT_SCALE} is missing",
    ),
    "pre_quant_scale removed": (
        "int8_sq", remove(FC + PRE_QUANT_SCALE), f"tensor {FC}{PRE_QUANT_SCALE} is missing",
    ),
    "KV scale removed": ("fp8", remove(KV_SCALE), f"tensor {KV_SCALE} is missing"),
    "head removed": ("fp8", remove(HEAD), f"tensor {HEAD} is missing"),
    "tensor added": (
        "fp8", lambda tensors: tensors.update(more=torch.ones(1)), "unexpected tensor more",
    ),
    "pre_quant_scale added to fp8": (
        "fp8",
        lambda tensors: tensors.update(
            {FC + PRE_QUANT_SCALE: torch.ones(512, dtype=torch.bfloat16)}
        ),
        f"unexpected tensor {FC}{PRE_QUANT_SCALE}",
    ),
    "norm in float32": (
        "fp8", replace(NORM, torch.Tensor.float), f"{NORM} must have dtype BF16, got F32",
    ),
    "scale in bfloat16": (
        "int8_sq", replace(FC + SCALE, torch.Tensor.bfloat16),
        f"{FC}{SCALE} must have dtype F32, got BF16",
    ),
    "pre_quant_scale in float32": (
        "int4_awq", replace(FC + PRE_QUANT_SCALE, torch.Tensor.float),
        f"{FC}{PRE_QUANT_SCALE} must have dtype BF16, got F32",
    ),
    "fp8 codes in bfloat16": (
        "fp8", replace(f"{FC}weight", torch.Tensor.bfloat16),
        f"{FC}weight must have dtype F8_E4M3, got BF16",
    ),
    "int4 codes not packed": (
        "int4_awq", replace(f"{FC}weight", lambda t: t.repeat(2, 1)),
        f"{FC}weight must have shape [128, 512], got [256, 512]",
    ),
    "weight not sharded": (
        "fp8", replace(f"{FC}weight", lambda t: t.view(torch.int8).repeat(2, 1).view(t.dtype)),
        f"{FC}weight must have shape [256, 512], got [512, 512]",
    ),
    "weight transposed": (
        "int8_sq", replace(f"{PROJ}weight", torch.Tensor.t),
        f"{PROJ}weight must have shape [512, 256], got [256, 512]",
    ),
    "scales transposed": (
        "int4_awq", replace(FC + SCALE, torch.Tensor.t),
        f"{FC}{SCALE} must have shape [256, 4], got [4, 256]",
    ),
    "one scale for all channels": (
        "int8_sq", replace(FC + SCALE, lambda t: t[:1]),
        f"{FC}{SCALE} must have shape [256], got [1]",
    ),
    "vocabulary not padded": (
        "fp8", replace(HEAD, lambda t: t[:-1]),
        f"{HEAD} must have shape [251, 512], got [250, 512]",
    ),
    "nonzero padding": (
        "fp8", fill(EMBEDDING, 1.0, index=250 * 512),
        f"{EMBEDDING} must be zero from row 250, after the vocabulary of 501",
    ),
    "NaN in a scale": (
        "int4_awq", fill(FC + SCALE, NAN), f"{FC}{SCALE} must be finite, got NaN or Inf",
    ),
    "Inf in a scale": (
        "int8_sq", fill(FC + SCALE, INF), f"{FC}{SCALE} must be finite, got NaN or Inf",
    ),
    "scale of zero": (
        "int4_awq", fill(FC + SCALE, 0.0), f"{FC}{SCALE} must hold positive scales, got 0",
    ),
    "negative scale": (
        "w4a8_awq", fill(FC + SCALE, -0.5), f"{FC}{SCALE} must hold positive scales, got -0.5",
    ),
    "block scale of zero": (
        "nvfp4", fill_byte(FC + SCALE, 0), f"{FC}{SCALE} must hold positive scales, got 0",
    ),
    "block scale of NaN": (
        "nvfp4", fill_byte(FC + SCALE, 0x7F), f"{FC}{SCALE} must be finite, got NaN",
    ),
    "fp8 code of NaN": (
        "fp8", fill_byte(f"{FC}weight", 0xFF), f"{FC}weight must be finite, got NaN",
    ),
    "NaN in the head": ("fp8", fill(HEAD, NAN), f"{HEAD} must be finite, got NaN or Inf"),
    "Inf in a 16 bit weight": (
        None, fill(f"{FC}weight", INF), f"{FC}weight must be finite, got NaN or Inf",
    ),
    "codes of zero": (
        "int4_awq", replace(f"{FC}weight", torch.zeros_like),
        f"{FC}weight must hold a nonzero value, got only zeros with the scales of other values",
    ),
    "different norm": ("fp8", fill(NORM, 3.0), f"{NORM} {REPLICATED}"),
    "different input scale": (
        "fp8", replace(FC + INPUT_SCALE, lambda t: t * 2), f"{FC}{INPUT_SCALE} {REPLICATED}",
    ),
    "different pre_quant_scale": (
        "int8_sq", fill(FC + PRE_QUANT_SCALE, 3.0), f"{FC}{PRE_QUANT_SCALE} {REPLICATED}",
    ),
    "different KV scale": (
        "fp8", replace(KV_SCALE, lambda t: t * 2), f"{KV_SCALE} {REPLICATED}",
    ),
    "different second scale": (
        "w4a8_awq", replace(f"{PROJ}{SCALE}_2", lambda t: t * 2), f"{PROJ}{SCALE}_2 {REPLICATED}",
    ),
    "different channel scales of a row-parallel linear": (
        "int8_sq", replace(PROJ + SCALE, lambda t: t * 2), f"{PROJ}{SCALE} {REPLICATED}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_damaged_tensor_is_reported(tmp_path, case):
    name, edit, expected = TENSOR_CASES[case]
    write_trtllm(tmp_path / "llm", encoded_model(name), (2, 1), "fp8")
    assert check_contract(tmp_path / "llm") == []
    edit_rank(tmp_path / "llm", 1, edit)
    assert_findings(tmp_path / "llm", f"rank1.safetensors: {expected}")


QUANTIZATION = "quantization"
# case: format, changed keys of config.json, findings
CONFIG_CASES = {
    "wrong world size": (
        "fp8", {"mapping": {"world_size": 3, "tp_size": 2, "pp_size": 1}},
        "mapping.world_size must be tp_size * pp_size = 2, got 3",
    ),
    "mapping key missing": (
        "fp8", {"mapping": {"tp_size": 2, "pp_size": 1}}, "mapping.world_size is missing",
    ),
    "mapping with a rank": (
        "fp8", {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1, "rank": 1}},
        "mapping.rank must not be in a portable checkpoint",
    ),
    "heads not divisible by the tensor size": (
        "fp8", {"num_attention_heads": 15, "num_key_value_heads": 5},
        "num_attention_heads 15 must be divisible by tp_size 2",
        "num_key_value_heads 5 must divide tp_size 2 or be a multiple of it",
    ),
    "heads not divisible by KV heads": (
        "fp8", {"num_key_value_heads": 6},
        "num_attention_heads 16 must be divisible by num_key_value_heads 6",
    ),
    "size that is no integer": (
        "fp8", {"vocab_size": "501"}, "vocab_size must be a positive integer, got '501'",
    ),
    "unknown algorithm": (
        "fp8", {QUANTIZATION: {"quant_algo": "FP9"}}, "unsupported quant_algo 'FP9'; supported: *",
    ),
    "key that TensorRT-LLM rejects": (
        "fp8", {QUANTIZATION: {"bits": 8}},
        "TensorRT-LLM rejects the key quantization.bits; remove it",
    ),
    "group size of another format": (
        "w4a8_awq", {QUANTIZATION: {"group_size": 64}},
        "group_size of W4A8_AWQ must be 128, got 64",
    ),
    "no group size": (
        "int4_awq", {QUANTIZATION: {"group_size": None}},
        "group_size of W4A16_AWQ must be 64 or 128, got None",
    ),
    "pre_quant_scale that the loader drops": (
        "int4_awq", {QUANTIZATION: {"pre_quant_scale": False}},
        "pre_quant_scale must be true for W4A16_AWQ, got False: *",
    ),
    "zero points": (
        "int4_awq", {QUANTIZATION: {"has_zero_point": True}}, "unsupported option has_zero_point",
    ),
    "quantized head": (
        "fp8", {QUANTIZATION: {"exclude_modules": []}},
        "exclude_modules must include lm_head, got []: *",
    ),
    "no excluded modules": (
        "fp8", {QUANTIZATION: {"exclude_modules": None}},
        "exclude_modules must be a list that includes lm_head, got None",
    ),
    "features that the loader pads": (
        "int4_awq", {"intermediate_size": 384},
        "intermediate_size 384 must be a multiple of 256: the loader pads linears of W4A16_AWQ *",
    ),
    "split group": (
        "nvfp4", {"intermediate_size": 528}, "intermediate_size 528 must be a multiple of 32: *",
    ),
    "unsupported activation": (
        "fp8", {"hidden_act": "gelu"}, "unsupported hidden_act 'gelu'; supported: silu",
    ),
    "unsupported architecture": (
        "fp8", {"architecture": "LlavaForCausalLM"},
        "unsupported architecture 'LlavaForCausalLM'; *",
    ),
    "biases": ("fp8", {"attn_bias": True}, "unsupported option attn_bias"),
    "experts": ("fp8", {"moe": {"num_experts": 8}}, "unsupported option moe"),
    "logits in bfloat16": (
        "fp8", {"logits_dtype": "bfloat16"}, "unsupported logits_dtype 'bfloat16'; *",
    ),
    "invalid rotary base": (
        "fp8", {"rotary_base": 0}, "rotary_base must be greater than 1, got 0",
    ),
    "rotary scaling without a type": (
        "fp8", {"rotary_scaling": {"factor": 2}}, "rotary_scaling must have the key type *",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_damaged_config_is_reported(tmp_path, case):
    name, changes, *expected = CONFIG_CASES[case]

    def apply(config):
        block = config[QUANTIZATION] | changes.get(QUANTIZATION, {})
        config.update(changes | {QUANTIZATION: block})

    write_trtllm(tmp_path / "llm", encoded_model(name), (2, 1), "fp8")
    edit_config(tmp_path / "llm", apply)
    assert_findings(tmp_path / "llm", *(f"config.json: {finding}" for finding in expected))
