"""VILA-1.5's way of looking: a SigLIP tower, 2x2 blocks of its patches, two linears."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import SiglipVisionConfig, SiglipVisionModel

from nemo_vlm_ptq.families.towers import hidden_states, merge_patches, tower_names

TokenOrder = Literal["column", "row"]


class VilaVision(nn.Module):
    """views [images,3,h,w] -> features [image tokens, hidden of the decoder].

    order: the way the blocks of an image are read: down its columns, as VILA-1.5 was trained, or
    along its rows, as NVILA reads them.
    """

    def __init__(self, tower: dict[str, Any], hidden: int, layer: int, order: TokenOrder) -> None:
        super().__init__()
        config = SiglipVisionConfig(**tower | {"vision_use_head": False})
        self.layer, self.order = layer, order
        self.vision_tower = SiglipVisionModel(config)
        width = 4 * config.hidden_size
        self.mm_projector = nn.ModuleDict(
            {
                "1": nn.LayerNorm(width),
                "2": nn.Linear(width, hidden),
                "4": nn.Linear(hidden, hidden),
            }
        )

    @torch.no_grad()
    def forward(self, pixels: Any) -> torch.Tensor:
        """Features of all images, one after the other."""
        return self.project(pixels.pixel_values).flatten(0, 1)

    def project(self, views: torch.Tensor) -> torch.Tensor:
        """Features [n,tokens,H] of each image."""
        x = downsample(hidden_states(self.vision_tower, views, self.layer), self.order)
        norm, first, second = self.mm_projector.values()
        return second(functional.gelu(first(norm(x))))

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by their published names."""
        projector = {
            f"mm_projector/layers.{name}": tensor
            for name, tensor in self.mm_projector.named_parameters()
        }
        return tower_names("vision_tower/", self.vision_tower) | projector


def downsample(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Patches [n,g*g,C] -> blocks [n,m*m,4C]; an odd grid gets a zero row and column first."""
    side = round(x.shape[1] ** 0.5)
    grid = x.reshape(len(x), side, side, -1)
    if side % 2:
        grid = functional.pad(grid, (0, 0, 0, 1, 0, 1))
    blocks = merge_patches(grid)
    if order == "column":
        blocks = blocks.transpose(1, 2)
    return blocks.flatten(1, 2)


def token_count(image_size: int, patch_size: int) -> int:
    """Tokens of one image."""
    return (-(-(image_size // patch_size) // 2)) ** 2
