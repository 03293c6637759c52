"""NF4 as bitsandbytes 0.50 serializes a linear: what transformers and vLLM read without packing.

Blocks of 64 run through the flattened Hugging Face tensor, and their absmaxes are rounded to 8 bits
in blocks of 256 of their own, which run through the whole tensor too. So a tensor is packed whole,
not part by part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from nemo_vlm_ptq.formats import NF4_BLOCK
from nemo_vlm_ptq.numerics import (
    NF4,
    NF4_NESTED_BLOCK,
    dequantize_nf4_absmax,
    encode,
    quantize_nf4_absmax,
    weight_amax,
)
from nemo_vlm_ptq.targets.writing.packing import pack_flat

NestedAbsmax = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize(weight_OK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, NestedAbsmax]:
    """Nibbles [O,K] uint8, absmaxes [O,G] float32 as they are read back, and how they are stored.

    The last is (codes uint8 [O*G], their scales float32 [ceil(O*G/256)], offset float32 []).
    """
    absmax = weight_amax(weight_OK, "group", NF4_BLOCK)
    double = quantize_nf4_absmax(absmax.flatten())
    read_back = dequantize_nf4_absmax(*double).reshape(absmax.shape)
    return encode(weight_OK, read_back, "nf4"), read_back, double


def tensors(
    codes_OK: torch.Tensor, double: NestedAbsmax, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of one linear.

    Args:
        codes_OK: nibbles, uint8.
        double: from `quantize`.
        dtype: that a reader should give the weight.
    """
    absmax, nested, offset = double
    every = torch.arange(256, dtype=torch.uint8)
    state = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(codes_OK.shape),
        "nested_blocksize": NF4_NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": float(offset),
    }
    return {
        "weight": pack_flat(codes_OK),
        "weight.absmax": absmax,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": dequantize_nf4_absmax(every, torch.ones(1), torch.zeros(())),
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def quantization_config(dtype: str, beside: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json, as transformers' BitsAndBytesConfig writes it.

    Args:
        dtype: of what is not quantized, by name.
        beside: names of tower and projector tensors, which are skipped by the module at their top;
            vLLM looks for its own name, transformers 5 for that below `model.`
    """
    tops = sorted({name.removeprefix("model.").split(".")[0] for name in beside})
    skipped = ["lm_head", *tops, *(f"model.{top}" for top in tops)]
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }
