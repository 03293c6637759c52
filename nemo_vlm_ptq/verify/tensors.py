"""Tensors read back from an export against the 16 bit source they came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from nemo_vlm_ptq.checkpoints.huggingface import SourceReader
from nemo_vlm_ptq.reference.checkpoint import Dequantized, ReadCheckpoint, ReadKv, ReadLinear
from nemo_vlm_ptq.reference.number_formats import E2M1, NF4
from nemo_vlm_ptq.utils.pinned_memory import to_device
from nemo_vlm_ptq.utils.progress import progress_bar

ROUNDING = 2.0**-8  # of a 16 bit weight after division by its prequant scale
FP8_HALF_STEP = 2.0**-4  # relative
# Codes that do not lie evenly.
CODES = {"nvfp4": (*(-x for x in reversed(E2M1)), *E2M1[1:]), "nf4": NF4}


def check_names(read: ReadCheckpoint, expected: Iterable[str]) -> list[str]:
    """Every tensor of the source is accounted for, and nothing else is there."""
    have = set(read.plain) | {f"{name}.weight" for name in read.linears}
    wanted = set(expected)
    problems = [f"{name} is missing" for name in sorted(wanted - have)]
    return problems + [f"{name} is extra" for name in sorted(have - wanted)]


def check_quantized_set(read: ReadCheckpoint, expected: Iterable[str]) -> list[str]:
    """Just the linears of the decoder are quantized, no more and no less."""
    wanted = {name.removesuffix(".weight") for name in expected}
    problems = [f"{name} is not quantized" for name in sorted(wanted - set(read.linears))]
    return problems + [f"{name} is quantized" for name in sorted(set(read.linears) - wanted)]


def check_untouched(
    plain: Mapping[str, torch.Tensor],
    source: SourceReader,
    dtype: torch.dtype,
    folded: Mapping[str, torch.Tensor] | None = None,
) -> list[str]:
    """Tensors that are not quantized are the source's, bit for bit, in the export's dtype.

    Those in `folded` are the source's times their factor, rounded to that dtype.
    """
    problems, folded = [], folded or {}
    for name, tensor in sorted(plain.items()):
        if tensor.dtype != dtype:  # torch.equal is true across dtypes
            problems.append(f"{name} is {tensor.dtype}, not {dtype}")
            continue
        wanted = source.whole(name).to(dtype)
        if name in folded:
            wanted = (wanted.float() * folded[name]).to(dtype)
        if not torch.equal(tensor, wanted):
            problems.append(f"{name} differs from the source")
    return problems


def check_linears(
    linears: Mapping[str, ReadLinear],
    source: SourceReader,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[str], float]:
    """Dequantized weights lie within half a step of the source; the worst distance in steps.

    A linear at a time is compared on the device.
    """
    problems, worst = [], 0.0
    for name, linear in progress_bar("verify weights", "linear", 0, sorted(linears.items())):
        weight = to_device(source.whole(f"{name}.weight"), device).to(dtype).float()
        values = linear.values(device)
        if weight.shape != values.weight.shape:
            problems.append(f"{name} has shape {tuple(values.weight.shape)}")
            continue
        excess = half_step_excess(weight, linear, values)
        worst = max(worst, float(excess.amax()))
        if bool((excess > 1).any()) or not bool(excess.isfinite().all()):
            count = int((excess > 1).sum())
            problems.append(f"{name}: {count} weights lie more than half a step off")
    return problems, worst


def check_input_scales(
    linears: Mapping[str, ReadLinear], expected: Mapping[str, float]
) -> list[str]:
    """The scale of every linear's input is the one that was solved."""
    problems = []
    for name, linear in sorted(linears.items()):
        if linear.input_scale is None or name not in expected:
            problems.append(f"{name} has no input scale")
        elif not math.isclose(float(linear.input_scale), expected[name], rel_tol=1e-6):
            problems.append(
                f"{name}: input scale {float(linear.input_scale):.6g}, not {expected[name]:.6g}"
            )
    return problems


def check_kv_scales(kv: ReadKv | None, expected: Sequence[tuple[float, float]]) -> list[str]:
    """Scales (of keys, of values) of every layer's KV cache are those that were solved."""
    if kv is None:
        return ["the KV cache has no scales"]
    found = list(zip(kv.key.tolist(), kv.value.tolist(), strict=True))
    if len(found) != len(expected):
        return [f"{len(found)} layers have KV scales, not {len(expected)}"]
    return [
        f"layer {layer}: scale of {what} {own:.6g}, not {wanted:.6g}"
        for layer, pair in enumerate(zip(found, expected, strict=True))
        for what, own, wanted in zip(("keys", "values"), *pair, strict=True)
        if not math.isclose(own, wanted, rel_tol=1e-6)
    ]


def half_step_excess(
    weight_OK: torch.Tensor, linear: ReadLinear, values: Dequantized
) -> torch.Tensor:
    """|error| over what rounding allows, [O,K]; 1 and less is right; `values` are the linear's.

    An int4 value at the end of the code range may stand for anything beyond it (clipping).
    """
    exact, device = weight_OK, weight_OK.device
    if linear.pre_quant_scale is not None:
        exact = exact / linear.pre_quant_scale.to(device)
    slack = exact.abs() * ROUNDING
    if linear.low_rank is not None:
        a_rK, b_Or = (part.to(device) for part in linear.low_rank)  # noqa: N806
        exact = exact - b_Or @ a_rK
        slack = slack + exact.abs() * ROUNDING
    found, step = values.weight, values.step
    error = (found - exact).abs()
    allowed = _half_step(exact, linear.number, step)
    allowed = allowed + found.abs() * FP8_HALF_STEP * linear.fp8_roundings  # W4A8
    if values.step_error is not None:  # values lie beyond a step that came out too small
        beyond = exact.abs() > step.abs()
        allowed = torch.where(beyond, torch.maximum(allowed, values.step_error), allowed)
        slack = slack + (found.abs() + allowed) * ROUNDING  # products or scales to 16 bit
    if linear.number == "int4":
        top, below = 7 * step, 1 - FP8_HALF_STEP * linear.fp8_roundings
        beyond = (exact.abs() >= found.abs()) & (found.abs() >= top * below * 0.999)
        same_side = exact.sign() == found.sign()
        error = torch.where(beyond & same_side, torch.zeros_like(error), error)
    return error / (allowed + slack).clamp(min=torch.finfo(torch.float32).tiny)


def _half_step(exact_OK: torch.Tensor, number: str, step: torch.Tensor) -> torch.Tensor:
    """Half the distance between the codes around a value, [O,K]."""
    if number == "fp8":
        return exact_OK.abs() * FP8_HALF_STEP + step * 2.0**-10
    if number not in CODES:
        return step.expand_as(exact_OK) / 2
    codes = torch.tensor(CODES[number], device=exact_OK.device)
    ratio = (exact_OK / step).clamp(codes[0], codes[-1])
    upper = torch.bucketize(ratio.nan_to_num(), codes).clamp(min=1)
    return (codes[upper] - codes[upper - 1]) / 2 * step.abs()


def compare_logits(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """How far two logits [S,V] are apart: relative to the spread of the second, and in argmax."""
    spread = theirs.std()
    return {
        "largest": float((ours - theirs).abs().amax() / spread),
        "mean": float((ours - theirs).abs().mean() / spread),
        "argmax_equal": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
