"""Tensors read back from an export against the 16 bit source they came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from nemo_vlm_ptq.progress import progress_bar
from nemo_vlm_ptq.runtime.checkpoint import ReadCheckpoint, ReadLinear
from nemo_vlm_ptq.source import Reader

ROUNDING = 2.0**-8  # of a 16 bit weight after division by its prequant scale


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
    plain: Mapping[str, torch.Tensor], source: Reader, dtype: torch.dtype
) -> list[str]:
    """Tensors that are not quantized are the source's, bit for bit, in the export's dtype."""
    problems = []
    for name, tensor in sorted(plain.items()):
        if tensor.dtype != dtype:  # torch.equal is true across dtypes
            problems.append(f"{name} is {tensor.dtype}, not {dtype}")
        elif not torch.equal(tensor, source.whole(name).to(dtype)):
            problems.append(f"{name} differs from the source")
    return problems


def check_linears(
    linears: Mapping[str, ReadLinear], source: Reader, dtype: torch.dtype
) -> tuple[list[str], float]:
    """Dequantized weights lie within half a step of the source; the worst distance in steps."""
    problems, worst = [], 0.0
    for name, linear in progress_bar("verify weights", "linear", 0, sorted(linears.items())):
        weight = source.whole(f"{name}.weight").to(dtype).float()
        if weight.shape != linear.weight.shape:
            problems.append(f"{name} has shape {tuple(linear.weight.shape)}")
            continue
        excess = half_step_excess(weight, linear)
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


def half_step_excess(weight_OK: torch.Tensor, linear: ReadLinear) -> torch.Tensor:
    """|error| over what rounding allows, [O,K]; values up to 1 are right.

    A value at the end of the code range may stand for anything beyond it (clipping).
    """
    exact = weight_OK if linear.prequant is None else weight_OK / linear.prequant
    error = (linear.weight - exact).abs()
    if linear.rounding_weight == "fp8":
        allowed = exact.abs() * 2.0**-4 + linear.step * 2.0**-10
    else:
        allowed = linear.step.expand_as(exact) / 2
    if linear.rounding_weight == "int4" and linear.rounding == "fp8":
        allowed = allowed + linear.weight.abs() * 2.0**-4  # W4A8 rounds once more, to fp8
    allowed = allowed + exact.abs() * ROUNDING
    if linear.rounding_weight == "int4":
        top, slack = 7 * linear.step, 1 - 2.0**-4 * (linear.rounding == "fp8")
        beyond = (exact.abs() >= linear.weight.abs()) & (linear.weight.abs() >= top * slack * 0.999)
        same_side = exact.sign() == linear.weight.sign()
        error = torch.where(beyond & same_side, torch.zeros_like(error), error)
    return error / allowed.clamp(min=torch.finfo(torch.float32).tiny)


def compare_logits(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """How far two logits [S,V] are apart: relative to the spread of the second, and in argmax."""
    spread = theirs.std()
    return {
        "largest": float((ours - theirs).abs().amax() / spread),
        "mean": float((ours - theirs).abs().mean() / spread),
        "argmax_equal": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
