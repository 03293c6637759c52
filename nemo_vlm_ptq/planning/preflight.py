"""What can be tried before anything runs: asking the model a question, and writing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.data.questions import (
    PROMPT_SUFFIX,
    Questions,
    calibration_questions,
    evaluation_questions,
)
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning.plan import Plan

if TYPE_CHECKING:
    from nemo_vlm_ptq.families.base import Sample


def run_preflight(plan: Plan, stages: Iterable[str]) -> None:
    """Both, for the stages that are to run.

    Raises:
        UserError: something will not work.
    """
    check_questions(plan, stages)
    check_workdir_writable(Path(plan.recipe.workdir))


def check_questions(plan: Plan, stages: Iterable[str]) -> None:
    """Data that the stages will ask for is there, and the first question of it makes a sample.

    Raises:
        UserError: it is not, or a file of the model folder that questions need is missing or of
            another model.
    """
    recipe, asked = plan.recipe, list[Questions]()
    if "observe" in stages:
        asked.append(calibration_questions(recipe.calibration))
    if {"verify", "evaluate"} & set(stages):
        asked.append(evaluation_questions(recipe.evaluate.data, recipe.evaluate.limit))
    if asked:
        _try_first(plan, asked)


def check_workdir_writable(work: Path) -> None:
    """A workdir can be made, or written into.

    Raises:
        UserError: it cannot.
    """
    there = next(place for place in (work, *work.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"workdir {work}: {there} cannot be written; choose another workdir")


def _try_first(plan: Plan, asked: Sequence[Questions]) -> None:
    """The first question of each through the prompt and, without weights, through the tower."""
    import torch

    prepare = plan.family.make_preprocessor(plan.folder, plan.config)
    with torch.device("meta"):
        tower = plan.family.make_vision_module(plan.config)
    for questions in asked:
        if not questions.items:
            raise UserError(f"data {questions.name!r} holds no questions")
        item = questions.items[0]
        image = questions.image(item.image) if item.image else None
        sample = prepare(item.id, item.text + PROMPT_SUFFIX, image)
        if sample.pixels is not None:
            _look(plan, tower, sample)


def _look(plan: Plan, tower: Any, sample: Sample) -> None:
    """A sample's image through a tower without weights."""
    from nemo_vlm_ptq.families.base import ImageInputs

    assert sample.pixels is not None
    try:
        features = tower(
            ImageInputs(sample.pixels.pixel_values.to("meta"), sample.pixels.image_sizes)
        )
    except ValueError as error:  # transformers', for pictures of another size
        raise UserError(
            f"{plan.folder}: the image processor does not fit the tower: {error}"
        ) from None
    room = int(sample.is_image.sum())
    if len(features) != room:
        raise UserError(
            f"{plan.folder}: question {sample.id!r} has room for {room} image tokens and its image "
            f"gives {len(features)}; the image processor does not fit the tower"
        )
