"""Fake quantization of weights with little memory traffic, for searches that repeat it many times.

The result equals that of `numerics.fake_quantize` bit for bit, without materializing the codes.

Legend: O output features, K input features, G groups of g inputs.
"""

from __future__ import annotations

import torch

from nemo_vlm_ptq.formats import MAX_CODE, MIN_AMAX, MIN_CODE, NumberFormat, QuantFormat
from nemo_vlm_ptq.numerics import fake_quantize


def fake_quantize_weight(
    weight_OK: torch.Tensor,
    amax: torch.Tensor,
    fmt: QuantFormat,
    amax_2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize a weight, float32 [O,K]; returns a new tensor.

    Args:
        weight_OK: in any dtype.
        amax: [], [O] or [O,G], as `LinearScales.weight_amax`.
        fmt: the format.
        amax_2: [], of the second quantization of formats that have one.
    """
    values = _fake_quantize_once(weight_OK, amax, fmt.weight)
    if fmt.second_weight is not None and amax_2 is not None:
        values = _fake_quantize_once(values, amax_2, fmt.second_weight)
    return values


def _fake_quantize_once(
    weight_OK: torch.Tensor, amax: torch.Tensor, number_format: NumberFormat
) -> torch.Tensor:
    if number_format in ("nvfp4", "nf4"):
        return fake_quantize(weight_OK, amax, number_format)
    min_code, max_code = MIN_CODE[number_format], MAX_CODE[number_format]
    safe = torch.where(amax > MIN_AMAX, amax.float(), 1.0)
    safe_OG = safe.reshape(-1, 1) if safe.dim() < 2 else safe
    # A tensor, because PyTorch divides a Python number by a tensor through the reciprocal.
    max_code_OG = torch.full_like(safe_OG, max_code)
    factor_OG = max_code_OG / safe_OG
    values_OGg = weight_OK.unflatten(1, (safe_OG.shape[1], -1)) * factor_OG[..., None]
    if number_format == "fp8":
        codes = values_OGg.clamp_(min_code, max_code).to(torch.float8_e4m3fn)
        values_OGg.copy_(codes)
    else:
        values_OGg.round_().clamp_(min_code, max_code)
    return values_OGg.mul_((safe_OG / max_code_OG)[..., None]).flatten(1)
