"""Operations that the vision modules of several families share.

Legend: n images or views, C channels of the vision tower, g patches along a side, m = g/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def tower_parameters(prefix: str, tower: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a CLIP or SigLIP tower by published name.

    The published names have `vision_model.`, which newer versions of transformers leave out.
    """
    return {
        f"{prefix}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in tower.named_parameters()
    }


def select_hidden_states(
    tower: Callable[..., Any], pixel_values: torch.Tensor, layers: int | Sequence[int]
) -> Any:
    """Encode images [n,3,h,w] and return the hidden states of one layer or several.

    Returns:
        [n,tokens,C], or [n,tokens,C * layers] with the layers concatenated.
    """
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    indices = [layers] if isinstance(layers, int) else layers
    return torch.cat([states[i] for i in indices], dim=-1)


def merge_patches(grid: torch.Tensor) -> torch.Tensor:
    """Concatenate the channels of each 2x2 block of patches: [n,g,g,C] -> [n,m,m,4C].

    The order within a block is row by row.
    """
    m = grid.shape[1] // 2
    blocks = grid.reshape(len(grid), m, 2, m, 2, -1).permute(0, 1, 3, 2, 4, 5)
    return blocks.flatten(3)
