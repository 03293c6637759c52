"""Paired comparison of a quantized model with the 16-bit model on the same questions.

A paired comparison detects far smaller losses than two separate accuracies, because only the
questions whose correctness changed contribute variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.evaluate.gqa import Z_95

INTERVAL_METHOD = "95 % adjusted Wald interval for paired shares (Bonett and Price 2012)"
SIGNIFICANCE_TEST = "exact two-sided McNemar test"
FLOAT_TOLERANCE = 1e-9  # percentage points; absorbs the rounding of a drop equal to its limit


@dataclass(frozen=True)
class Comparison:
    """Result of a paired comparison.

    difference and interval are quantized minus 16 bit, in percentage points. lost counts questions
    that only the 16-bit model answers correctly, gained those that only the quantized model does.
    p_value is the probability of a split at least as uneven if quantization had no effect.
    """

    total: int
    lost: int
    gained: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    interval_method: str = INTERVAL_METHOD
    test: str = SIGNIFICANCE_TEST


def compare(correct_16bit: Mapping[str, bool], correct_quantized: Mapping[str, bool]) -> Comparison:
    """Compare two mappings of question id -> answered correctly.

    Raises:
        UserError: the mappings have different keys, or are empty.
    """
    if correct_16bit.keys() != correct_quantized.keys() or not correct_quantized:
        mismatched = len(correct_16bit.keys() ^ correct_quantized.keys())
        raise UserError(
            "16-bit and quantized answers must be to the same questions: got "
            f"{len(correct_16bit)} and {len(correct_quantized)} ids, {mismatched} not in both; "
            "run the stage 'evaluate' again"
        )
    lost = sum(correct_16bit[key] and not correct_quantized[key] for key in correct_quantized)
    gained = sum(correct_quantized[key] and not correct_16bit[key] for key in correct_quantized)
    total = len(correct_quantized)
    return Comparison(
        total=total,
        lost=lost,
        gained=gained,
        difference=100 * (gained - lost) / total,
        interval=paired_interval(lost, gained, total),
        p_value=mcnemar_p_value(lost, gained),
    )


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    It is the probability that lost + gained fair coin flips split at least as unevenly.
    """
    flips, smaller = lost + gained, min(lost, gained)
    binomial, cumulative = 1, 0
    for heads in range(smaller + 1):
        cumulative += binomial
        binomial = binomial * (flips - heads) // (heads + 1)
    return min(1.0, 2 * cumulative / 2**flips)  # integers until the division, hence exact


def paired_interval(lost: int, gained: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of (gained - lost) / total in percentage points.

    Adjusted Wald interval with one pseudo-observation of either change, which keeps a positive
    width when nothing changed: Bonett and Price 2012, J. Educ. Behav. Stat. 37(4).
    """
    p_lost, p_gained, n = (lost + 1) / (total + 2), (gained + 1) / (total + 2), total + 2
    half_width = Z_95 * math.sqrt((p_lost + p_gained - (p_gained - p_lost) ** 2) / n)
    low, high = p_gained - p_lost - half_width, p_gained - p_lost + half_width
    return max(-100.0, 100 * low), min(100.0, 100 * high)


def passes_gate(drop: float, limit: float | None) -> bool:
    """Return whether an accuracy drop (16 bit minus quantized) is within the limit, if any.

    Both values are in percentage points.
    """
    return limit is None or drop <= limit + FLOAT_TOLERANCE
