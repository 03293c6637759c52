"""Attention masks of models in which the tokens of an image attend to each other both ways."""

from __future__ import annotations

import torch


def image_masks(
    mask: torch.Tensor, is_image: torch.Tensor, window: int, *, full_is_causal: bool = False
) -> dict[str, torch.Tensor]:
    """Return the masks [B,1,S,S] bool of layers with full and with sliding attention.

    True where a token attends. Left padding attends to itself, so that no row is empty.

    Args:
        mask: [B,S], 1 at tokens and 0 at padding.
        is_image: [B,S] bool, True at image tokens; images have text between them.
        window: tokens that a token attends to in sliding layers, up to itself.
        full_is_causal: whether tokens of an image attend to each other in sliding layers only.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    distance = place[:, None] - place[None, :]
    before = torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    image = (is_image & ~before).cumsum(dim=1)  # how many images began so far
    same = (image[:, :, None] == image[:, None, :]) & is_image[:, :, None] & is_image[:, None, :]
    full = ((distance >= 0) | same) & mask.bool()[:, None, :]
    full |= distance == 0
    sliding = full & (distance < window)
    if full_is_causal:
        full = full & (distance >= 0)
    return {"full_attention": full[:, None], "sliding_attention": sliding[:, None]}
