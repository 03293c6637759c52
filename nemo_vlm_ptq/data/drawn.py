"""Drawn scenes as data sets: what the names `scenes` and `hard_scenes` stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image

from nemo_vlm_ptq.data import hard_questions, hard_scenes, scene_questions, scenes
from nemo_vlm_ptq.errors import UserError

LEVELS = {
    "scenes": (scene_questions.questions, scenes.draw),
    "hard_scenes": (hard_questions.questions, hard_scenes.draw),
}
SCENES_PER_SPLIT = 250  # scenes that questions are drawn from, unless more are needed
MIN_QUESTIONS_PER_SCENE = 8
MAX_SCENES = 1250  # drawing more takes minutes


def drawn_questions(
    name: str, split: str, limit: int | None
) -> tuple[dict[str, Any], Callable[[str], PIL.Image.Image]]:
    """Return questions in GQA's format, at least `limit`, and the function that draws images.

    Args:
        name: key of LEVELS.
        split: "calibration", "test" or "train".
        limit: questions that are needed; None for those of SCENES_PER_SPLIT scenes.

    Raises:
        UserError: more are needed than there are.
    """
    count = max(SCENES_PER_SPLIT, -(-(limit or 0) // MIN_QUESTIONS_PER_SCENE))
    if count > MAX_SCENES:
        most = MAX_SCENES * MIN_QUESTIONS_PER_SCENE
        raise UserError(f"data {name} has {most} questions at most, got {limit}")
    questions, draw = LEVELS[name]
    return questions(split, count), draw
