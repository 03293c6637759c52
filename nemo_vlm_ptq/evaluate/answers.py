"""Generate one model's answers to all questions, in batches of similar prompt length.

Each image is encoded once and its features are kept, because many questions share an image and all
formats of a model share the 16-bit vision tower. This costs host or device memory per image.

Legend: H hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, Questions
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Preprocess, Sample

MAX_NEW_TOKENS = 16  # longer than any GQA answer: a truncated answer could not have matched


class GenerationBackend(Protocol):
    """Runnable form of a checkpoint; moves its inputs to its own device and dtype."""

    def encode_images(self, images: ImageInputs, /) -> torch.Tensor:
        """Encode images into decoder features [image tokens,H]."""
        ...

    def generate(
        self,
        samples: Sequence[Sample],
        features: Sequence[torch.Tensor | None],
        max_new_tokens: int,
        /,
    ) -> list[list[int]]:
        """Decode greedily and return the new token ids of each sample, without stop ids.

        Args:
            samples: the prompts.
            features: image features [image tokens,H] of each sample, None for text only.
            max_new_tokens: upper bound of new tokens per sample.
        """
        ...


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image: preprocessed inputs on the meta device and features [image tokens,H]."""

    inputs: ImageInputs | None
    features: torch.Tensor | None


@dataclass(frozen=True)
class EvaluatedModel:
    """A model under evaluation, with its preprocessing and its cache of encoded images.

    encoded_images maps image ids to encoded images. Image ids are unique within one dataset only,
    so each dataset needs a cache of its own. Formats of one model may share a cache, because the
    vision tower stays in 16 bit.
    """

    backend: GenerationBackend
    preprocess: Preprocess
    decode: Callable[[list[int]], str]
    encoded_images: dict[str, EncodedImage] = field(default_factory=dict)


def generate_answers(
    model: EvaluatedModel,
    questions: Questions,
    images: Mapping[str, tuple[str, ...]] | None = None,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Generate the answer text of each question.

    Args:
        model: the model; images that are not in its cache are encoded and added to it.
        questions: the questions; a prompt is the question followed by GQA's suffix.
        images: question id -> ids of the images to show; None shows each question's own.
        batch_size: questions per call of the backend; they are sorted by length, then by id.
        progress: called with (answered, total) after each batch.

    Returns:
        Question id -> answer, in the order of the questions.

    Raises:
        UserError: the number of image tokens in a prompt differs from the number of features.
    """
    image_ids = {item.id: images[item.id] if images else item.images for item in questions.items}
    samples = _make_samples(model, questions, image_ids)
    samples.sort(key=lambda sample: (len(sample.input_ids), sample.id))
    answers: dict[str, str] = {}
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        features = [_join_features(model, image_ids[sample.id]) for sample in batch]
        outputs = model.backend.generate(batch, features, MAX_NEW_TOKENS)
        for sample, token_ids in zip(batch, outputs, strict=True):
            answers[sample.id] = model.decode(token_ids)
        if progress is not None:
            progress(len(answers), len(samples))
    return {item.id: answers[item.id] for item in questions.items}


def _make_samples(
    model: EvaluatedModel, questions: Questions, image_ids: Mapping[str, tuple[str, ...]]
) -> list[Sample]:
    """Preprocess all questions; load and encode the images that are not in the cache."""
    samples = []
    for item in questions.items:
        names, text = image_ids[item.id], item.text + PROMPT_SUFFIX
        for name in names:
            if name not in model.encoded_images:
                alone = model.preprocess(item.id, text, questions.load_image(name))
                model.encoded_images[name] = _encode_image(model.backend, alone.images)
        inputs = [model.encoded_images[name].inputs for name in names]
        sample = model.preprocess(item.id, text, [one for one in inputs if one is not None])
        _check_image_tokens(sample, names, _join_features(model, names))
        samples.append(sample)
    return samples


def _join_features(model: EvaluatedModel, names: Sequence[str]) -> torch.Tensor | None:
    """Return the features [image tokens,H] of images in order; None if there are none."""
    features = [model.encoded_images[name].features for name in names]
    present = [one for one in features if one is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat(present)


def _encode_image(backend: GenerationBackend, inputs: ImageInputs | None) -> EncodedImage:
    """Encode a single image and release its pixel values.

    Images are not batched, so that the features of an image do not depend on other questions.
    """
    if inputs is None:
        return EncodedImage(inputs=None, features=None)
    shape_only = inputs.to_meta()
    return EncodedImage(inputs=shape_only, features=backend.encode_images(inputs))


def _check_image_tokens(
    sample: Sample, names: Sequence[str], features: torch.Tensor | None
) -> None:
    """Raise UserError when prompt and features differ in the number of image tokens."""
    expected, got = int(sample.is_image.sum()), 0 if features is None else len(features)
    if expected != got:
        raise UserError(
            f"question {sample.id!r}: prompt has {expected} image tokens but image "
            f"{', '.join(map(repr, names))} has {got} features; the model folder's image processor "
            "and its vision config must match"
        )
