"""Interpret modelopt's quantizer states: number formats, and fake quantization of weights.

Written from modelopt's behavior, without modelopt, so that the reader is independent of it.

Legend: O output features, K input features, G groups of K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.reference.checkpoint import Dequantized, StoredTensors
from nemo_vlm_ptq.reference.number_formats import (
    E2M1_MAX,
    FP8_MAX,
    NVFP4_BLOCK,
    ActivationFormat,
    round_to_e2m1,
    round_to_fp8,
)

MAX_INT_CODE = {8: 127.0, 4: 7.0}  # num_bits -> largest code
FLOAT_FORMATS = {(4, 3): "fp8", (2, 1): "nvfp4"}  # num_bits (exponent, mantissa) -> format

QuantizerState = Mapping[str, Any]  # of one TensorQuantizer


def decode(
    state: QuantizerState, number_format: str, quantizers: Sequence[str], stored: StoredTensors
) -> Dequantized:
    """Fake-quantize selected rows of a weight with its first quantizer, then with fp8 ones.

    Args:
        state: of the first quantizer.
        number_format: of the first quantizer.
        quantizers: names of all quantizers, in order.
        stored: weight [O,K], row indices, and the amax of each quantizer by its name.
    """
    weight, rows, amax = stored["weight"], stored["rows"], stored[quantizers[0]]
    weight_OK = weight[rows].float()
    if amax.numel() > 1:
        amax = amax.reshape(len(weight), -1)[rows]
    step = _step(state, number_format, amax, weight_OK)
    values_OK = _round_codes(weight_OK / step, number_format) * step
    values_OK = torch.where(step > 0, values_OK, torch.zeros_like(values_OK))
    for name in quantizers[1:]:
        scale = stored[name].reshape(()) / FP8_MAX
        values_OK = round_to_fp8(values_OK / scale) * scale
    return Dequantized(weight=values_OK, step=step)


def number_format_of(state: QuantizerState, linear: str) -> str:
    """Return the number format of a weight quantizer.

    Raises:
        VerificationError: the number format is not supported.
    """
    bits = state["_num_bits"]
    if bits in FLOAT_FORMATS:
        return FLOAT_FORMATS[bits]
    if bits not in MAX_INT_CODE:
        supported = ", ".join(map(str, (*FLOAT_FORMATS, *MAX_INT_CODE)))
        raise VerificationError(
            f"{linear}: unsupported num_bits {bits} of weights; supported: {supported}"
        )
    return f"int{bits}"


def _step(
    state: QuantizerState, number_format: str, amax: torch.Tensor, weight_OK: torch.Tensor
) -> torch.Tensor:
    """Return the quantization step, broadcastable to the weight."""
    if number_format == "nvfp4":
        block_amax = weight_OK.unflatten(-1, (-1, NVFP4_BLOCK)).abs().amax(dim=-1)
        scale_2 = amax.reshape(()) / (E2M1_MAX * FP8_MAX)
        block_scale = round_to_fp8(block_amax / (E2M1_MAX * scale_2)) * scale_2
        return block_scale.repeat_interleave(NVFP4_BLOCK, 1)
    if number_format == "fp8":
        return amax.reshape((-1, 1) if amax.numel() > 1 else ()) / FP8_MAX
    block_sizes, max_code = state["_block_sizes"] or {}, MAX_INT_CODE[state["_num_bits"]]
    if -1 not in block_sizes:
        return amax.reshape(-1, 1) / max_code
    amax_OG = amax.reshape(weight_OK.shape[0], -1)
    return amax_OG.repeat_interleave(block_sizes[-1], dim=1) / max_code


def _round_codes(scaled: torch.Tensor, number_format: str) -> torch.Tensor:
    if number_format == "fp8":
        return round_to_fp8(scaled)
    if number_format == "nvfp4":
        return round_to_e2m1(scaled)
    max_code = MAX_INT_CODE[int(number_format.removeprefix("int"))]
    return scaled.round().clamp(-max_code - 1, max_code)


def input_format_of(state: QuantizerState, linear: str) -> tuple[ActivationFormat, float | None]:
    """Return the format of an input quantizer, and amax / scale; None for dynamic scales.

    Raises:
        VerificationError: the number format is not supported.
    """
    bits, block_sizes = state["_num_bits"], state["_block_sizes"] or {}
    if bits == (2, 1):
        return "nvfp4", E2M1_MAX * FP8_MAX
    if bits == (4, 3):
        return ("fp8_token", None) if block_sizes else ("fp8", FP8_MAX)
    if bits == 8 and not block_sizes:
        return "int8", MAX_INT_CODE[8]
    raise VerificationError(
        f"{linear}: unsupported num_bits {bits} of inputs; supported: (4, 3), (2, 1), 8 per tensor"
    )
