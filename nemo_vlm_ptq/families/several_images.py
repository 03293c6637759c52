"""Images of one question: the inputs of each, and those of all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_vlm_ptq.families.base import ImageInputs


def process_images(images: Any, process: Callable[[Any], ImageInputs]) -> list[ImageInputs]:
    """Return the inputs of each image of a question.

    Args:
        images: None, an image, or a list of images; one may be the inputs of an image.
        process: returns the inputs of an image in RGB.
    """
    several = images if isinstance(images, list | tuple) else [images]
    return [
        image if isinstance(image, ImageInputs) else process(image.convert("RGB"))
        for image in several
        if image is not None
    ]


def join_images(images: Sequence[ImageInputs]) -> ImageInputs | None:
    """Return the inputs of all images of a question, padded; None if there are none.

    Padding is 0, and the place -1 of a patch.
    """
    if len(images) < 2:
        return images[0] if images else None
    return ImageInputs(
        pixel_values=_concatenate([image.pixel_values for image in images]),
        image_sizes=_concatenate_all([image.image_sizes for image in images]),
        grids=_concatenate_all([image.grids for image in images]),
        pixel_mask=_concatenate_all([image.pixel_mask for image in images]),
        patch_positions=_concatenate_all([image.patch_positions for image in images], -1),
    )


def _concatenate_all(
    tensors: Sequence[torch.Tensor | None], padding: int = 0
) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return _concatenate(present, padding) if len(present) == len(tensors) else None


def _concatenate(tensors: Sequence[torch.Tensor], padding: int = 0) -> torch.Tensor:
    """Concatenate along the first axis; the others are padded to the largest size."""
    most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        whole = tensor.new_full((len(tensor), *most), padding)
        whole[tuple(slice(size) for size in tensor.shape)] = tensor
        padded.append(whole)
    return torch.cat(padded)
