"""Images whose tiles have the same number of tokens each."""

from __future__ import annotations

import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImagePlaceholders


def tiles_of_tokens(is_image: torch.Tensor, count: int, kind: str = "tile") -> ImagePlaceholders:
    """Return the tiles whose expanded tokens stand in a row of ids.

    Args:
        is_image: [S] bool, True at image tokens.
        count: tokens of one tile.
        kind: what a tile is, for messages.

    Raises:
        UserError: their number is not a multiple of the tokens of one tile.
    """
    found = int(is_image.sum())
    if found % count:
        raise UserError(
            f"the number of image tokens must be a multiple of {count}, the tokens of one {kind}, "
            f"got {found}"
        )
    return ImagePlaceholders(is_image=is_image, tokens_per_placeholder=1, num_images=found // count)


def drop_padding(
    pixel_values: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tiles of all rows without those that pad a row, which are all 0.

    Args:
        pixel_values: [B,tiles,3,h,w].
        mask: [B,tiles,h,w], or None.

    Returns:
        [n,3,h,w], and [n,h,w] or None.
    """
    tiles = pixel_values.flatten(0, 1)
    kept = (tiles != 0).flatten(1).any(dim=1)
    return tiles[kept], None if mask is None else mask.flatten(0, 1)[kept]
