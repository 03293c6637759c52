"""Positions of three rows of Qwen-VL: temporal, height and width."""

from __future__ import annotations

import torch


def mrope_positions(is_image: torch.Tensor, grids: torch.Tensor | None, merge: int) -> torch.Tensor:
    """Return the positions [3,S] of a sample's tokens.

    Text counts up in all three rows. The tokens of an image at position p have p, p + row and
    p + column; text goes on at p + max(rows, columns).

    Args:
        is_image: [S] bool; images are separated by text.
        grids: [images,3] int64, patches of each image in time, height and width.
        merge: patches along a side that become one token.
    """
    length = len(is_image)
    positions = torch.zeros(3, length, dtype=torch.int64)
    start, position = 0, 0
    for t, h, w in [] if grids is None else grids.tolist():
        rows, columns = h // merge, w // merge
        first = start + int(is_image[start:].int().argmax())
        positions[:, start:first] = position + torch.arange(first - start)
        position, start = position + first - start, first + t * rows * columns
        grid = torch.meshgrid(*map(torch.arange, (t, rows, columns)), indexing="ij")
        positions[:, first:start] = position + torch.stack(grid).flatten(1)
        position += max(rows, columns)
    positions[:, start:] = position + torch.arange(length - start)
    return positions
