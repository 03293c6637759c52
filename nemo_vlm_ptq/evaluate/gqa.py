"""GQA's accuracy as LLaVA counts it: the answer must match word for word.

The rule's name stands in the result, because lmms-eval and others count differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from nemo_vlm_ptq.data.questions import Questions
from nemo_vlm_ptq.errors import UserError

RULE = "llava"
Z = NormalDist().inv_cdf(0.975)  # half width of a 95 % interval, in standard deviations


@dataclass(frozen=True)
class Score:
    """Accuracy and its 95 % Wilson interval in percent; by_kind holds (correct, total)."""

    rule: str
    total: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    by_kind: dict[str, tuple[int, int]]


def normalize(text: str) -> str:
    """An answer, as LLaVA's GQA script reads what a model said; GQA's own are so already."""
    return text.strip().rstrip(".").lower()


def judge(questions: Questions, answers: Mapping[str, str]) -> dict[str, bool]:
    """Question id -> whether its answer is right, in the order of the questions.

    Raises:
        UserError: a question has no answer.
    """
    missing = [item.id for item in questions.items if item.id not in answers]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions.items)} questions of {questions.name!r} have no "
            f"answer, first {missing[0]!r}; run the stage 'evaluate' again"
        )
    return {
        item.id: normalize(answers[item.id]) == normalize(item.answer) for item in questions.items
    }


def score(questions: Questions, answers: Mapping[str, str]) -> Score:
    """Accuracy over all questions and by kind.

    Raises:
        UserError: no questions, or one without an answer.
    """
    if not questions.items:
        raise UserError(f"data {questions.name!r} holds no questions to score")
    right = judge(questions, answers)
    by_kind = {item.kind: (0, 0) for item in sorted(questions.items, key=lambda item: item.kind)}
    for item in questions.items:
        correct, total = by_kind[item.kind]
        by_kind[item.kind] = (correct + right[item.id], total + 1)
    correct, total = sum(right.values()), len(right)
    accuracy = 100 * correct / total
    return Score(RULE, total, correct, accuracy, wilson(correct, total), by_kind)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson, 1927)."""
    share, square = correct / total, Z * Z / total
    middle = share + square / 2
    half = Z * math.sqrt((share * (1 - share) + square / 4) / total)
    ends = (100 * (middle + side * half) / (1 + square) for side in (-1, 1))
    low, high = (round(end, 9) + 0.0 for end in ends)  # all right ends at 100, not just below
    return low, high
