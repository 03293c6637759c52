"""Encode NF4 weights with double quantization, as bitsandbytes 0.50 does.

Blocks of 64 values run through the flattened Hugging Face tensor. Their absmax values are quantized
to 8 bits in nested blocks of 256, which also run through the whole tensor (double quantization).
Fused parts therefore cannot be encoded separately.

Legend: O output features, K input features, G = K / 64 blocks.
"""

from __future__ import annotations

import torch

from nemo_vlm_ptq.formats import NF4_BLOCK
from nemo_vlm_ptq.numerics import (
    dequantize_nf4_absmax,
    encode,
    quantize_nf4_absmax,
    weight_amax,
)

NestedAbsmax = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_nf4(
    weight_OK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, NestedAbsmax]:
    """Quantize a weight with double quantization.

    Returns:
        Codes [O,K] uint8; dequantized absmax [O,G] float32; quantized absmax as (codes [O*G] uint8,
        nested absmax [ceil(O*G/256)] float32, offset [] float32).
    """
    absmax_OG = weight_amax(weight_OK, "group", NF4_BLOCK)
    nested = quantize_nf4_absmax(absmax_OG.flatten())
    dequantized_OG = dequantize_nf4_absmax(*nested).reshape(absmax_OG.shape)
    return encode(weight_OK, dequantized_OG, "nf4"), dequantized_OG, nested
