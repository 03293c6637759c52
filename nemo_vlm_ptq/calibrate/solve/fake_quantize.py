"""A weight as a reader of its format sees it, with as little memory traffic as plain torch allows.

Bit for bit what `numerics.round_trip` gives, without its codes: searches round a weight dozens of
times.
"""

from __future__ import annotations

import torch

from nemo_vlm_ptq.formats import MAX_CODE, MIN_CODE, NumberFormat, QuantFormat
from nemo_vlm_ptq.numerics import fake_quantize


def fake_quantize_weight(
    weight_OK: torch.Tensor,
    amax: torch.Tensor,
    row: QuantFormat,
    amax_2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes and back, float32 [O,K], a new tensor.

    Args:
        weight_OK: what is rounded, in any dtype.
        amax: [], [O] or [O,G], as `LinearScales` has it.
        row: the format.
        amax_2: [] of the second rounding, where the format has one.
    """
    values = _there_and_back(weight_OK, amax, row.weight)
    if row.second_weight is not None and amax_2 is not None:
        values = _there_and_back(values, amax_2, row.second_weight)
    return values


def _there_and_back(
    weight_OK: torch.Tensor, amax: torch.Tensor, kind: NumberFormat
) -> torch.Tensor:
    if kind in ("nvfp4", "nf4"):
        return fake_quantize(weight_OK, amax, kind)
    safe = torch.where(amax > 0, amax.float(), 1.0)
    safe_OG = safe.reshape(-1, 1) if safe.dim() < 2 else safe
    largest_OG = torch.full_like(safe_OG, MAX_CODE[kind])  # a GPU divides by a number otherwise
    factor_OG = largest_OG / safe_OG
    values_OGg = weight_OK.unflatten(1, (safe_OG.shape[1], -1)) * factor_OG[..., None]
    if kind == "fp8":
        codes = values_OGg.clamp_(MIN_CODE[kind], MAX_CODE[kind]).to(torch.float8_e4m3fn)
        values_OGg.copy_(codes)
    else:
        values_OGg.round_().clamp_(MIN_CODE[kind], MAX_CODE[kind])
    return values_OGg.mul_((safe_OG / largest_OG)[..., None]).flatten(1)
