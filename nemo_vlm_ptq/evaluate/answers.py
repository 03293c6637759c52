"""Answers of one model to many questions: every image is looked at once, questions in batches.

Legend: H hidden size of the decoder; an image's features are what its is_image positions take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, Questions
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Preprocess, Sample

MAX_NEW_TOKENS = 16  # longer than any GQA answer: what is cut off could not have matched


class Runtime(Protocol):
    """An exported checkpoint that can be run; it moves tensors to its own device and dtype."""

    def encode(self, pixels: ImageInputs, /) -> torch.Tensor:
        """Images -> features [image tokens,H]."""
        ...

    def generate(
        self,
        samples: Sequence[Sample],
        features: Sequence[torch.Tensor | None],
        max_new_tokens: int,
        /,
    ) -> list[list[int]]:
        """New token ids of each sample, greedy, stop ids removed; features [image tokens,H]."""
        ...


@dataclass(frozen=True)
class EncodedImage:
    """One image: what was prepared, without its values, and features [image tokens,H]."""

    pixels: ImageInputs | None
    features: torch.Tensor | None


@dataclass(frozen=True)
class AnsweringModel:
    """Who is asked. Formats of one model share `seen` (image id -> Seen): vision stays 16 bit.

    Image ids are those of one data set, so each data set needs a `seen` of its own.
    """

    runtime: Runtime
    prepare: Preprocess
    decode: Callable[[list[int]], str]
    seen: dict[str, EncodedImage] = field(default_factory=dict)


def answer_all(
    model: AnsweringModel,
    questions: Questions,
    images: Mapping[str, str] | None = None,
    *,
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Question id -> the text that the model answers, in the order of the questions.

    Args:
        model: who is asked; its `seen` grows by the images that were not in it.
        questions: what is asked; the prompt is the question and GQA's suffix.
        images: question id -> image id to show; None shows each question's own.
        batch: questions per call of the runtime; they are sorted by length, then id.
        progress: called with (answered, all) after each batch.

    Raises:
        UserError: image tokens of a prompt and features of its image differ in number.
    """
    shown = {item.id: images[item.id] if images else item.image for item in questions.items}
    samples = _prepare_all(model, questions, shown)
    samples.sort(key=lambda sample: (len(sample.input_ids), sample.id))
    answers: dict[str, str] = {}
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        features = [model.seen[shown[sample.id]].features for sample in part]
        tokens = model.runtime.generate(part, features, MAX_NEW_TOKENS)
        for sample, ids in zip(part, tokens, strict=True):
            answers[sample.id] = model.decode(ids)
        if progress is not None:
            progress(len(answers), len(samples))
    return {item.id: answers[item.id] for item in questions.items}


def _prepare_all(
    model: AnsweringModel, questions: Questions, shown: Mapping[str, str]
) -> list[Sample]:
    """Samples of all questions; images that are new to the model are drawn and encoded."""
    samples = []
    for item in questions.items:
        name, text = shown[item.id], item.text + PROMPT_SUFFIX
        if name in model.seen:
            sample = model.prepare(item.id, text, model.seen[name].pixels)
        else:
            sample = model.prepare(item.id, text, questions.image(name))
            model.seen[name] = _look(model.runtime, sample.pixels)
        _check(sample, name, model.seen[name].features)
        samples.append(sample)
    return samples


def _look(runtime: Runtime, pixels: ImageInputs | None) -> EncodedImage:
    """One image at a time: its features do not depend on the others asked; values are let go."""
    if pixels is None:
        return EncodedImage(None, None)
    return EncodedImage(
        ImageInputs(pixels.pixel_values.to("meta"), pixels.image_sizes), runtime.encode(pixels)
    )


def _check(sample: Sample, image: str, features: torch.Tensor | None) -> None:
    need, have = int(sample.is_image.sum()), 0 if features is None else len(features)
    if need != have:
        raise UserError(
            f"question {sample.id!r} has room for {need} image tokens but image {image!r} gives "
            f"{have}; the model folder's image processor and its vision config do not match"
        )
