"""Name and lay out NF4 tensors as bitsandbytes 0.50 does, for transformers and vLLM to load.

Legend: O output features, K input features, G = K / 64 blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from nemo_vlm_ptq.formats import NF4_BLOCK
from nemo_vlm_ptq.numerics import NF4_NESTED_BLOCK, NF4_VALUES, dequantize_nf4_absmax
from nemo_vlm_ptq.targets.writing.nf4_encoding import NestedAbsmax
from nemo_vlm_ptq.targets.writing.packing import pack_flat


def linear_tensors(
    codes_OK: torch.Tensor, nested_absmax: NestedAbsmax, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Build the tensors of one linear by the suffix of their name.

    Args:
        codes_OK: codes, uint8, one per element.
        nested_absmax: quantized absmax from `quantize`.
        dtype: dtype that bitsandbytes dequantizes to.
    """
    absmax, nested, offset = nested_absmax
    every_code = torch.arange(256, dtype=torch.uint8)
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
        "weight.nested_quant_map": dequantize_nf4_absmax(
            every_code, torch.ones(1), torch.zeros(())
        ),
        "weight.quant_map": torch.tensor(NF4_VALUES),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def quantization_config(
    dtype: str, unquantized: Iterable[str], linears: Iterable[str] = ()
) -> dict[str, Any]:
    """Build `quantization_config` of config.json as transformers' BitsAndBytesConfig writes it.

    Args:
        dtype: name of the compute dtype.
        unquantized: names of vision tower and projector tensors. Their top-level modules are
            skipped, with and without `model.`: transformers 5 matches the former, vLLM the latter.
        linears: MODULE.LINEAR in the decoder's layers: transformers matches these ends of names,
            vLLM the module.
    """
    modules = sorted({name.removeprefix("model.").split(".")[0] for name in unquantized})
    skip_modules = ["lm_head", *modules, *(f"model.{module}" for module in modules)]
    skip_modules += [*linears, *sorted({name.split(".")[0] for name in linears})]
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }
