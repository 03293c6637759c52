"""GQA accuracy by LLaVA's rule: exact match after normalization.

The rule's name is part of the result, because lmms-eval and other harnesses score differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from nemo_vlm_ptq.data.questions import Questions
from nemo_vlm_ptq.errors import UserError

SCORING_RULE = "llava"
Z_95 = NormalDist().inv_cdf(0.975)  # half width of a 95 % interval, in standard deviations


@dataclass(frozen=True)
class Score:
    """Accuracy and its 95 % Wilson interval in percent.

    by_kind maps GQA's question types to (correct, total).
    """

    rule: str
    total: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    by_kind: dict[str, tuple[int, int]]


def normalize(text: str) -> str:
    """Normalize an answer as LLaVA's GQA script does; GQA's references are normalized already."""
    return text.strip().rstrip(".").lower()


def match_answers(questions: Questions, answers: Mapping[str, str]) -> dict[str, bool]:
    """Return question id -> whether the answer matches the reference, in question order.

    Raises:
        UserError: a question has no answer.
    """
    missing = [item.id for item in questions.items if item.id not in answers]
    if missing:
        raise UserError(
            f"answers are missing for {len(missing)} of {len(questions.items)} questions of "
            f"{questions.name!r}, first {missing[0]!r}; run the stage 'evaluate' again"
        )
    return {
        item.id: normalize(answers[item.id]) == normalize(item.answer) for item in questions.items
    }


def score(questions: Questions, answers: Mapping[str, str]) -> Score:
    """Compute the accuracy over all questions and per question type.

    Raises:
        UserError: there are no questions, or a question has no answer.
    """
    if not questions.items:
        raise UserError(f"data {questions.name!r} has no questions to score")
    matches = match_answers(questions, answers)
    by_kind = {
        item.question_type: (0, 0)
        for item in sorted(questions.items, key=lambda item: item.question_type)
    }
    for item in questions.items:
        correct, total = by_kind[item.question_type]
        by_kind[item.question_type] = (correct + matches[item.id], total + 1)
    correct, total = sum(matches.values()), len(matches)
    return Score(
        rule=SCORING_RULE,
        total=total,
        correct=correct,
        accuracy=100 * correct / total,
        interval=wilson_interval(correct, total),
        by_kind=by_kind,
    )


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion in percent (Wilson, 1927)."""
    proportion, z_squared = correct / total, Z_95 * Z_95 / total
    center = proportion + z_squared / 2
    half_width = Z_95 * math.sqrt((proportion * (1 - proportion) + z_squared / 4) / total)
    ends = (100 * (center + sign * half_width) / (1 + z_squared) for sign in (-1, 1))
    low, high = (round(end, 9) + 0.0 for end in ends)  # all correct must end at exactly 100
    return low, high
