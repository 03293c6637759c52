"""Compare tensors read back from an export with the 16 bit source."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from nemo_vlm_ptq.checkpoints.huggingface import SourceReader
from nemo_vlm_ptq.reference.checkpoint import Dequantized, ReadCheckpoint, ReadKvCache, ReadLinear
from nemo_vlm_ptq.reference.number_formats import E2M1_MAGNITUDES, NF4_VALUES
from nemo_vlm_ptq.utils.pinned_memory import to_device
from nemo_vlm_ptq.utils.progress import progress_bar

BF16_HALF_ULP = 2.0**-8  # relative rounding error of a weight divided by its pre_quant_scale
FP8_HALF_STEP = 2.0**-4  # relative
# Values of number formats whose codes are not evenly spaced.
CODES = {
    "nvfp4": (*(-x for x in reversed(E2M1_MAGNITUDES)), *E2M1_MAGNITUDES[1:]),
    "nf4": NF4_VALUES,
}


def check_names(read: ReadCheckpoint, expected: Iterable[str]) -> list[str]:
    """Check that the tensors are exactly those of the source."""
    actual = set(read.plain) | {f"{name}.weight" for name in read.linears}
    names = set(expected)
    findings = [f"{name} is missing" for name in sorted(names - actual)]
    return findings + [f"{name} is extra" for name in sorted(actual - names)]


def check_quantized_set(read: ReadCheckpoint, expected: Iterable[str]) -> list[str]:
    """Check that exactly the expected linears are quantized."""
    required = {name.removesuffix(".weight") for name in expected}
    findings = [f"{name} is not quantized" for name in sorted(required - set(read.linears))]
    return findings + [f"{name} is quantized" for name in sorted(set(read.linears) - required)]


def check_untouched(
    plain: Mapping[str, torch.Tensor],
    source: SourceReader,
    dtype: torch.dtype,
    folded: Mapping[str, tuple[torch.Tensor, float]] | None = None,
    kept: Collection[str] = (),
) -> list[str]:
    """Check that tensors that are not quantized equal the source bit for bit in the export's dtype.

    Tensors in `folded`, with a factor and an offset, equal (source + offset) * factor - offset,
    rounded to that dtype. Those in `kept` have the source's dtype.
    """
    findings, folded = [], folded or {}
    for name, tensor in sorted(plain.items()):
        required = source.get_tensor(name)
        if name not in kept:
            required = required.to(dtype)
        if tensor.dtype != required.dtype:  # torch.equal is true across dtypes
            findings.append(f"{name} is {tensor.dtype}, not {required.dtype}")
            continue
        if name in folded:
            factor, offset = folded[name]
            required = ((required.float() + offset) * factor - offset).to(dtype)
        if not torch.equal(tensor, required):
            findings.append(f"{name} differs from the source")
    return findings


def check_linears(
    linears: Mapping[str, ReadLinear],
    source: SourceReader,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[str], float]:
    """Check that dequantized weights lie within half a quantization step of the source.

    Linears are compared one at a time on the device.

    Returns:
        Findings, and the worst error in units of the error allowed.
    """
    findings, worst = [], 0.0
    for name, linear in progress_bar("verify weights", "linear", 0, sorted(linears.items())):
        weight = to_device(source.get_tensor(f"{name}.weight"), device).to(dtype).float()
        values = linear.dequantize(device)
        if weight.shape != values.weight.shape:
            findings.append(f"{name} has shape {tuple(values.weight.shape)}")
            continue
        excess = half_step_excess(weight, linear, values)
        worst = max(worst, float(excess.amax()))
        if bool((excess > 1).any()) or not bool(excess.isfinite().all()):
            count = int((excess > 1).sum())
            findings.append(f"{name}: {count} weights lie more than half a step off")
    return findings, worst


def check_input_scales(
    linears: Mapping[str, ReadLinear], expected: Mapping[str, float]
) -> list[str]:
    """Check that the input scale of every linear is the solved one."""
    findings = []
    for name, linear in sorted(linears.items()):
        if linear.input_scale is None or name not in expected:
            findings.append(f"{name} has no input scale")
        elif not math.isclose(float(linear.input_scale), expected[name], rel_tol=1e-6):
            findings.append(
                f"{name}: input scale {float(linear.input_scale):.6g}, not {expected[name]:.6g}"
            )
    return findings


def check_kv_scales(kv: ReadKvCache | None, expected: Sequence[tuple[float, float]]) -> list[str]:
    """Check that the KV cache scales (keys, values) of every layer are the solved ones."""
    if kv is None:
        return ["the KV cache has no scales"]
    found = list(zip(kv.key_scale.tolist(), kv.value_scale.tolist(), strict=True))
    if len(found) != len(expected):
        return [f"{len(found)} layers have KV scales, not {len(expected)}"]
    return [
        f"layer {layer}: scale of {what} {actual:.6g}, not {solved:.6g}"
        for layer, pair in enumerate(zip(found, expected, strict=True))
        for what, actual, solved in zip(("keys", "values"), *pair, strict=True)
        if not math.isclose(actual, solved, rel_tol=1e-6)
    ]


def half_step_excess(
    weight_OK: torch.Tensor, linear: ReadLinear, values: Dequantized
) -> torch.Tensor:
    """Return |error| over the rounding error allowed, [O,K]; at most 1 is correct.

    An int4 value at the end of the code range may represent anything beyond it (clipping).

    Args:
        weight_OK: weight of the source, float32.
        linear: the linear that was read.
        values: its dequantized weight and steps.
    """
    exact, device = weight_OK, weight_OK.device
    if linear.pre_quant_scale is not None:
        exact = exact / linear.pre_quant_scale.to(device)
    slack = exact.abs() * BF16_HALF_ULP
    if linear.low_rank is not None:
        a_rK, b_Or = (part.to(device) for part in linear.low_rank)  # noqa: N806
        exact = exact - b_Or @ a_rK
        slack = slack + exact.abs() * BF16_HALF_ULP
    found, step = values.weight, values.step
    error = (found - exact).abs()
    allowed = _half_step(exact, linear.number_format, step)
    allowed = allowed + found.abs() * FP8_HALF_STEP * linear.fp8_roundings  # W4A8
    if values.step_error is not None:  # the step was rounded down, so values may exceed it
        beyond = exact.abs() > step.abs()
        allowed = torch.where(beyond, torch.maximum(allowed, values.step_error), allowed)
        slack = (
            slack + (found.abs() + allowed) * BF16_HALF_ULP
        )  # products or scales rounded to 16 bit
    if values.underflow is not None:
        allowed = allowed + values.underflow
    if linear.number_format == "int4":
        top, below = 7 * step, 1 - FP8_HALF_STEP * linear.fp8_roundings
        beyond = (exact.abs() >= found.abs()) & (found.abs() >= top * below * 0.999)
        same_side = exact.sign() == found.sign()
        error = torch.where(beyond & same_side, torch.zeros_like(error), error)
    return error / (allowed + slack).clamp(min=torch.finfo(torch.float32).tiny)


def _half_step(exact_OK: torch.Tensor, number: str, step: torch.Tensor) -> torch.Tensor:
    """Return half the distance between the codes around a value, [O,K]."""
    if number == "fp8":
        return exact_OK.abs() * FP8_HALF_STEP + step * 2.0**-10
    if number not in CODES:
        return step.expand_as(exact_OK) / 2
    codes = torch.tensor(CODES[number], device=exact_OK.device)
    ratio = (exact_OK / step).clamp(codes[0], codes[-1])
    upper = torch.bucketize(ratio.nan_to_num(), codes).clamp(min=1)
    return (codes[upper] - codes[upper - 1]) / 2 * step.abs()


def compare_logits(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Return the distance of two logits [S,V], in standard deviations of the second."""
    spread = expected.std()
    return {
        "largest": float((actual - expected).abs().amax() / spread),
        "mean": float((actual - expected).abs().mean() / spread),
        "argmax_equal": float((actual.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
