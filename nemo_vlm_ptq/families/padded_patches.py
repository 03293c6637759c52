"""Images as rows of patches that are padded to the same number, with the place of each patch."""

from __future__ import annotations

from typing import Any

import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs


def block_counts(images: ImageInputs, vision: Any) -> list[int]:
    """Return how many square blocks of patches each image has.

    Args:
        images: with the places of their patches.
        vision: transformers' config of a tower that averages blocks.

    Raises:
        UserError: patches are no grids of whole blocks, row by row in front of padding.
    """
    if images.patch_positions is None:
        raise UserError("pixel_values need image_position_ids [images,patches,2]")
    side, most, counts = vision.pooling_kernel_size, vision.position_embedding_size, []
    for places in images.patch_positions.cpu():
        columns, rows = (places.amax(dim=0) + 1).tolist()
        is_whole = 0 < columns <= most and 0 < rows <= most and not (columns % side or rows % side)
        if not is_whole or not _is_grid(places, rows, columns):
            raise UserError(
                "image_position_ids must be column and row of each patch, row by row, of grids "
                f"whose sides are multiples of {side} up to {most}, and -1 at padding"
            )
        counts.append(columns * rows // side**2)
    return counts


def _is_grid(places: torch.Tensor, rows: int, columns: int) -> bool:
    """Return whether places [patches,2] are those of a grid, row by row, and -1 behind it."""
    if rows * columns > len(places):
        return False
    expected = torch.full_like(places, -1)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    expected[: len(grid)] = grid
    return torch.equal(places, expected)
