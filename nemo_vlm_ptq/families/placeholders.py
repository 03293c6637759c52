"""Image placeholders of prompts: expand them, and check that each image has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImagePlaceholders


def expand_placeholders(
    sample_id: str, ids: Sequence[int], placeholder_id: int, counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat the k-th placeholder counts[k] times.

    Returns:
        Ids [S] int64, and a mask [S] bool that is True at image tokens.

    Raises:
        UserError: the number of placeholders is not that of counts.
    """
    placeholder_ids = torch.tensor(ids, dtype=torch.int64)
    is_placeholder = placeholder_ids == placeholder_id
    check_placeholder_count(sample_id, int(is_placeholder.sum()), len(counts))
    repeats = torch.ones_like(placeholder_ids)
    repeats[is_placeholder] = torch.tensor(counts, dtype=torch.int64)
    input_ids = placeholder_ids.repeat_interleave(repeats)
    return input_ids, input_ids == placeholder_id


def images_of_tokens(is_image: torch.Tensor, counts: Sequence[int], key: str) -> ImagePlaceholders:
    """Return the next images whose expanded tokens stand in a row of ids.

    Args:
        is_image: [S] bool, True at image tokens.
        counts: tokens of the images not assigned yet.
        key: input that says the sizes of images, for messages.

    Raises:
        UserError: the row does not end with an image.
    """
    missing, images = int(is_image.sum()), 0
    while missing > 0 and images < len(counts):
        missing, images = missing - counts[images], images + 1
    if missing:
        raise UserError(
            f"{int(is_image.sum())} image tokens, which is not the sum of the next images' "
            f"{list(counts[:4])}; {key} must be that of the ids"
        )
    return ImagePlaceholders(is_image=is_image, tokens_per_placeholder=1, num_images=images)


def check_placeholder_count(sample_id: str, found: int, images: int) -> None:
    """Require one image placeholder in the prompt for each image of a sample.

    Raises:
        UserError: there are more or fewer.
    """
    if 0 < found < images:
        raise UserError(
            f"question {sample_id!r} has {images} images, of which its prompt shows {found}: the "
            "chat template takes one image; remove the question"
        )
    if found < images:
        raise UserError(
            f"question {sample_id!r}: the tokenizer does not map the image placeholder of the "
            "prompt to the image token of config.json; both must be of the same model"
        )
    if found > images:
        raise UserError(
            f"question {sample_id!r}: its text and answer must not hold image placeholders (got "
            f"{found} in the prompt, expected {images}); remove them, the prompt adds its own"
        )
