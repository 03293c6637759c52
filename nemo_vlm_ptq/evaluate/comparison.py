"""A quantized model against the 16-bit one on the same questions, pair by pair.

Pairs see far smaller losses than two separate accuracies: only questions that changed count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.evaluate.gqa import Z

METHOD = "95 % adjusted Wald interval for paired shares (Bonett and Price 2012)"
TEST = "exact two-sided McNemar test"


@dataclass(frozen=True)
class Comparison:
    """Paired result; difference is now - 16 bit, in points, and so is its interval.

    lost: right in 16 bit and wrong now; gained: the other way round; p_value: chance of a split
    at least as uneven between the two if quantization did not matter.
    """

    total: int
    lost: int
    gained: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    interval_method: str = METHOD
    test: str = TEST


def compare(right_16bit: Mapping[str, bool], right_now: Mapping[str, bool]) -> Comparison:
    """Compare two maps question id -> answered correctly.

    Raises:
        UserError: they are not of the same questions, or of none.
    """
    if right_16bit.keys() != right_now.keys() or not right_now:
        differ = len(right_16bit.keys() ^ right_now.keys())
        raise UserError(
            f"16-bit and quantized answers must be to the same questions: {len(right_16bit)} and "
            f"{len(right_now)} ids, {differ} not in both; run the stage 'evaluate' again"
        )
    lost = sum(right_16bit[name] and not right_now[name] for name in right_now)
    gained = sum(right_now[name] and not right_16bit[name] for name in right_now)
    total = len(right_now)
    difference = 100 * (gained - lost) / total
    return Comparison(
        total, lost, gained, difference, paired_interval(lost, gained, total), mcnemar(lost, gained)
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value: of lost + gained fair coins, as uneven as this or more."""
    coins, fewer = lost + gained, min(lost, gained)
    ways, below = 1, 0
    for heads in range(fewer + 1):
        below += ways
        ways = ways * (coins - heads) // (heads + 1)
    return min(1.0, 2 * below / 2**coins)  # exact whole numbers until the division


def paired_interval(lost: int, gained: int, total: int) -> tuple[float, float]:
    """95 % interval of (gained - lost) / total, in points: Wald with one more of either change.

    Bonett and Price 2012, J. Educ. Behav. Stat. 37(4); it keeps a width where nothing changed.
    """
    down, up, n = (lost + 1) / (total + 2), (gained + 1) / (total + 2), total + 2
    half = Z * math.sqrt((down + up - (up - down) ** 2) / n)
    return max(-100.0, 100 * (up - down - half)), min(100.0, 100 * (up - down + half))


def gate(drop: float, limit: float | None) -> bool:
    """Whether a drop against 16 bit, in points (16 bit - now), stays within the limit, if any."""
    return limit is None or drop <= limit + 1e-9
