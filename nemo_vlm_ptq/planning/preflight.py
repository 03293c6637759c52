"""Preflight check: look at the data, preprocess one question, see that the workdir is writable.

It runs in seconds and without weights, before ranks are started, so that a mismatch between data,
image processor and vision tower is not reported after hours of work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.checkpoints.huggingface import all_finite
from nemo_vlm_ptq.data.questions import (
    PROMPT_SUFFIX,
    Questions,
    calibration_questions,
    evaluation_questions,
)
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.input_files import reason_of, shorten
from nemo_vlm_ptq.planning.plan import Plan

if TYPE_CHECKING:
    from nemo_vlm_ptq.families.base import Sample


def run_preflight(plan: Plan, stages: Iterable[str]) -> None:
    """Check the data and the workdir for the stages that are to run.

    Raises:
        UserError: a check failed.
    """
    check_questions(plan, stages)
    check_workdir_writable(Path(plan.recipe.workdir))


def check_questions(plan: Plan, stages: Iterable[str]) -> None:
    """Check the stages' data: its images, its token ids, and that its first question works.

    Raises:
        UserError: data is missing or empty, or a file of the model folder that preprocessing needs
            is missing or does not match the model.
    """
    recipe, data_sets = plan.recipe, list[tuple[Questions, int | None]]()
    if "observe" in stages:
        calibration = recipe.calibration
        data_sets.append((calibration_questions(calibration), calibration.max_pixels))
    if "evaluate" in stages:
        questions = evaluation_questions(recipe.evaluate.data, recipe.evaluate.limit)
        data_sets.append((questions, None))
        if recipe.evaluate.form == "engine":
            _require_one_image(questions, "a TensorRT-LLM engine")
    elif "verify" in stages:
        questions = evaluation_questions(recipe.verification_data, recipe.evaluate.limit)
        data_sets.append((questions, None))
    for questions, _ in data_sets:
        if not questions.items:
            raise UserError(f"data {questions.name!r} holds no questions")
        if not plan.family.takes_several_images:
            _require_one_image(questions, f"family {plan.family.name}")
        questions.check_images()
    if data_sets:
        _check_samples(plan, data_sets)


def _require_one_image(questions: Questions, reader: str) -> None:
    """Raise UserError when a question has several images."""
    for item in questions.items:
        if len(item.images) > 1:
            raise UserError(
                f"question {item.id!r} of {questions.name} has {len(item.images)} images, and "
                f"{reader} takes one for a question; remove it, or choose other data"
            )


def check_workdir_writable(work: Path) -> None:
    """Check that the workdir can be created or written to.

    Raises:
        UserError: the workdir, or its nearest existing parent, is not a folder that is writable.
    """
    try:
        existing = next(path for path in (work, *work.absolute().parents) if os.path.lexists(path))
        work.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that no folder can have
        raise UserError(f"workdir {shorten(str(work))}: {reason_of(error)}") from None
    if not existing.is_dir():
        raise UserError(f"workdir {work}: {existing} is not a folder; choose another workdir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"workdir {work}: {existing} is not writable; choose another workdir")


def _check_samples(plan: Plan, data_sets: Sequence[tuple[Questions, int | None]]) -> None:
    """Preprocess a question of each data set and encode its images on the meta device.

    Each data set has the largest area of its images, if it is for calibration.

    It is the first of those with the most images. The others are tokenized only if the tokenizer
    has ids that the model has not.
    """
    import torch

    preprocess = plan.family.make_preprocessor(plan.folder, plan.config)
    tokenizer = load_tokenizer(plan.folder / plan.family.decoder_subfolder)
    matches = max(tokenizer.get_vocab().values(), default=0) < plan.decoder.vocab
    with torch.device("meta"):
        vision_module = plan.family.make_vision_module(plan.config)
    for questions, most in data_sets:
        item = max(questions.items, key=lambda one: len(one.images))
        images: list[Any] = [*questions.load_images(item)]
        sample = preprocess(item.id, item.text + PROMPT_SUFFIX, images, max_pixels=most)
        if most is not None:
            check_length(plan, sample, questions.name)
        _check_ids(plan, sample)
        if sample.images is not None:
            _check_image_features(plan, vision_module, sample)
            images = [preprocess(item.id, item.text, images[0]).images]
        for other in () if matches else questions.items:
            text, same = other.text + PROMPT_SUFFIX, images[:1] * len(other.images)
            _check_ids(plan, preprocess(other.id, text, same, other.answer))


def check_length(plan: Plan, sample: Sample, data: str) -> None:
    """Raise UserError when a sample has more tokens than the model has positions."""
    length, most = len(sample.input_ids), plan.decoder.max_positions
    if length > most:
        raise UserError(
            f"question {sample.id!r} of {data} has {length} tokens, image included, and the model "
            f"has {most} positions; shorten or remove it"
        )


def _check_ids(plan: Plan, sample: Sample) -> None:
    """Check that the embedding has a row for every token of a sample."""
    largest, rows = int(sample.input_ids.max()), plan.decoder.vocab
    if largest >= rows:
        what = "image token" if sample.is_image[sample.input_ids.argmax()] else "token"
        raise UserError(
            f"{plan.folder}: question {sample.id!r} has the {what} {largest}, and the embedding "
            f"has {rows} rows; tokenizer and model must match: resize the model's embedding"
        )


def _check_image_features(plan: Plan, vision_module: Any, sample: Sample) -> None:
    """Check pixels of a sample, and its number of image features against its placeholder tokens."""
    assert sample.images is not None
    if not all_finite(sample.images.pixel_values):
        raise UserError(
            f"{plan.folder}: the image processor makes NaN or Inf of question {sample.id!r}; look "
            "at rescale_factor, image_mean and image_std"
        )
    try:
        features = vision_module(sample.images.to_meta())
    except ValueError as error:  # raised by transformers for images of another size
        raise UserError(
            f"{plan.folder}: the image processor does not match the vision tower: {error}"
        ) from None
    expected = int(sample.is_image.sum())
    if len(features) != expected:
        raise UserError(
            f"{plan.folder}: question {sample.id!r} has {expected} image placeholder tokens but "
            f"its image has {len(features)} features; the image processor does not match the "
            "vision tower"
        )
