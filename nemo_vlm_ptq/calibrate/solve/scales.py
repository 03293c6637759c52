"""Scales of one linear from its weight and input statistics: plain arithmetic, no search.

A pre_quant_scale multiplies the input of a linear, and the weight is divided by it. The scale is
rounded to the model's dtype before the division, so that the stored scale is exactly the divisor.

Legend: O output features, K input features, G groups of inputs, R rank of a low-rank branch,
N rows of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.losses import group_amax, row_chunks
from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales, LowRank, select_rows
from nemo_vlm_ptq.calibrate.statistics import InputStatistics
from nemo_vlm_ptq.formats import MIN_AMAX, QuantFormat
from nemo_vlm_ptq.numerics import nudge_off_ties

STATIC_INPUT_FORMATS = ("fp8", "int8", "nvfp4")  # input formats that need an amax


def round_amax(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round an amax to the model's dtype, which a restored modelopt quantizer keeps it in.

    A finer value would give other codes than the restored model.
    """
    return amax.to(dtype).float()


def divide_by_pre_quant_scale(
    weight_OK: torch.Tensor, pre_quant_scale_K: torch.Tensor | None
) -> torch.Tensor:
    """Return the weight divided by its pre_quant_scale, in the weight's dtype."""
    if pre_quant_scale_K is None:
        return weight_OK
    inverse_K = 1.0 / pre_quant_scale_K.float()
    # With `out`, no float32 weight is materialized.
    return torch.mul(weight_OK, inverse_K, out=torch.empty_like(weight_OK))


def residual_weight(smooth_OK: torch.Tensor, branch: LowRank | None) -> torch.Tensor:
    """Subtract the low-rank branch from a weight divided by its pre_quant_scale, in its dtype.

    b a is summed in float64, so that the residual of a shard has the bits of the whole residual, on
    any device.
    """
    if branch is None:
        return smooth_OK
    a_RK, b_OR = branch
    product_OK = (b_OR.double() @ a_RK.double()).float()
    return (smooth_OK.float() - product_OK).to(smooth_OK.dtype)


def make_scales(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    fmt: QuantFormat,
    group_size: int,
    pre_quant_scale_K: torch.Tensor | None,
    *,
    branch: LowRank | None = None,
    amax: torch.Tensor | None = None,
) -> LinearScales:
    """Return the scales of a linear for a given pre_quant_scale, with their errors.

    Args:
        weight_OK: weight in the model's dtype.
        statistics: of its input.
        fmt: the format.
        group_size: inputs that share a weight scale.
        pre_quant_scale_K: or None; it is rounded to the model's dtype.
        branch: low-rank branch to subtract after the division.
        amax: weight amax; None: the largest magnitudes.
    """
    if pre_quant_scale_K is not None:
        pre_quant_scale_K = pre_quant_scale_K.to(weight_OK.dtype).float()
    plain_amax, tensor_amax = _weight_amax(weight_OK, fmt, group_size, pre_quant_scale_K, branch)
    input_amax = None
    if fmt.activation in STATIC_INPUT_FORMATS:
        amax_K = statistics.amax
        if pre_quant_scale_K is not None:
            amax_K = amax_K * pre_quant_scale_K
        input_amax = round_amax(amax_K.amax(), weight_OK.dtype)
    a_RK, b_OR = branch or (None, None)
    amax = plain_amax if amax is None else amax
    if fmt.weight != "nf4":  # zeros take the tensor's amax, so that no scale stands out
        amax = torch.where(amax > MIN_AMAX, amax, tensor_amax.to(amax))
    scales = LinearScales(
        weight_amax=amax,
        weight_amax_2=None if fmt.second_weight is None else tensor_amax,
        input_amax=input_amax,
        pre_quant_scale=pre_quant_scale_K,
        low_rank_a=a_RK,
        low_rank_b=b_OR,
    )
    if statistics.moment is None:
        return scales
    return with_errors(scales, weight_OK, statistics, fmt)


def prepare_weight(weight_OK: torch.Tensor, scales: LinearScales, fmt: QuantFormat) -> torch.Tensor:
    """Return the weight that the codes are computed from, in the weight's dtype.

    It is divided by its pre_quant_scale, reduced by its low-rank branch, and nudged off rounding
    ties. Every element depends on its own row alone, so that shards have the bits of the whole.

    Args:
        weight_OK: weight in the model's dtype, whole or a shard.
        scales: of the same rows and inputs, on the weight's device.
        fmt: the format.
    """
    prepared_OK = torch.empty_like(weight_OK)
    for rows, residual_NK in _residual_chunks(weight_OK, scales.pre_quant_scale, scales.branch):
        amax = select_rows(scales, rows).weight_amax
        prepared_OK[rows] = nudge_off_ties(residual_NK, amax, fmt.weight)
    return prepared_OK


def _residual_chunks(
    weight_OK: torch.Tensor, pre_quant_scale_K: torch.Tensor | None, branch: LowRank | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, the part of those rows that is quantized), chunk by chunk."""
    for rows in row_chunks(weight_OK.shape):
        branch_rows = None if branch is None else (branch[0], branch[1][rows])
        smooth_NK = divide_by_pre_quant_scale(weight_OK[rows], pre_quant_scale_K)
        yield rows, residual_weight(smooth_NK, branch_rows)


def _weight_amax(
    weight_OK: torch.Tensor,
    fmt: QuantFormat,
    group_size: int,
    pre_quant_scale_K: torch.Tensor | None,
    branch: LowRank | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the amax of the format's granularity, and that of the whole tensor."""
    width = group_size if fmt.granularity == "group" else weight_OK.shape[1]
    chunks = _residual_chunks(weight_OK, pre_quant_scale_K, branch)
    amax_OG = torch.cat([group_amax(residual_NK, width) for _, residual_NK in chunks])
    tensor_amax = amax_OG.amax()
    if fmt.granularity == "tensor":
        return tensor_amax, tensor_amax
    return (amax_OG if fmt.granularity == "group" else amax_OG[:, 0]), tensor_amax


def weight_delta(
    weight_NK: torch.Tensor,
    residual_NK: torch.Tensor,
    scales: LinearScales,
    fmt: QuantFormat,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the effective weight after quantization minus the weight, [N,K].

    Args:
        weight_NK: the weight.
        residual_NK: the part of it that is quantized.
        scales: of these rows.
        fmt: the format.
        dtype: of the result; computed in float32.
    """
    scale, amax_2 = scales.pre_quant_scale, scales.weight_amax_2
    if weight_NK.is_cuda and scales.branch is None and fmt.weight in ("fp8", "int8", "int4"):
        from nemo_vlm_ptq.calibrate.solve import kernels

        return kernels.weight_delta(
            weight_NK,
            None if scale is None else scale[None],
            scales.weight_amax,
            fmt.weight,
            None if fmt.second_weight is None or amax_2 is None else amax_2[None],
            dtype,
        )
    effective_NK = fake_quantize_weight(residual_NK, scales.weight_amax, fmt, amax_2)
    if scales.branch is not None:
        a_RK, b_NR = scales.branch
        effective_NK.addmm_(b_NR.float(), a_RK.float())
    if scale is not None:
        effective_NK.mul_(scale)
    return effective_NK.sub_(weight_NK).to(dtype)


def with_errors(
    scales: LinearScales,
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    fmt: QuantFormat,
) -> LinearScales:
    """Return the scales with the relative errors that they cause."""
    statistics = statistics.with_output_power(weight_OK)
    moments, shares, output_power = statistics.moments, statistics.shares, statistics.output_power
    error_power = {modality: torch.zeros_like(power) for modality, power in output_power.items()}
    for rows, residual_NK in _residual_chunks(weight_OK, scales.pre_quant_scale, scales.branch):
        delta_NK = weight_delta(weight_OK[rows], residual_NK, select_rows(scales, rows), fmt)
        for modality, moment in moments.items():
            error_power[modality] += moment.row_losses(delta_NK).sum()
    powers = {"all": _weighted(error_power, shares), **error_power}
    outputs = {"all": _weighted(output_power, shares), **output_power}
    losses, totals = torch.stack([*powers.values()]), torch.stack([outputs[key] for key in powers])
    ratios = torch.where(totals > 0, losses / totals, 0.0)  # a linear without output has no error
    errors = dict(zip(powers, ratios.clamp(min=0).sqrt().tolist(), strict=True))
    return replace(
        scales,
        error=errors["all"],
        error_text=errors.get("text"),
        error_image=errors.get("image"),
    )


def _weighted(powers: Mapping[str, Any], shares: Mapping[str, float]) -> Any:
    """Return the mean over all tokens of a power that is known per modality."""
    return sum(shares[modality] * power for modality, power in powers.items())
