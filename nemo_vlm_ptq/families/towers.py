"""What the vision paths share: published names of towers, hidden states, blocks of patches.

Legend: C channels of the tower, g patches along a side, m = g/2, H hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def tower_names(prefix: str, tower: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a CLIP or SigLIP tower by published name, whatever transformers calls them."""
    return {
        f"{prefix}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in tower.named_parameters()
    }


def hidden_states(tower: nn.Module, pixels: torch.Tensor, layers: int | Sequence[int]) -> Any:
    """[n,3,h,w] -> [n,tokens,C], or several layers side by side in the last axis."""
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    return torch.cat([hidden[i] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)


def merge_patches(grid: torch.Tensor) -> torch.Tensor:
    """[n,g,g,C] -> [n,m,m,4C]: each 2x2 block side by side, its rows from the top."""
    m = grid.shape[1] // 2
    blocks = grid.reshape(len(grid), m, 2, m, 2, -1).permute(0, 1, 3, 2, 4, 5)
    return blocks.flatten(3)
