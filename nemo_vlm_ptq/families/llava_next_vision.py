"""LLaVA-NeXT's way of looking: the whole image and its tiles, with a newline after each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    image_size_to_num_patches,
)

from nemo_vlm_ptq.families.llava_vision import LlavaVision


class LlavaNextVision(LlavaVision):
    """views [images,views,3,h,w] and sizes [images,2] -> features [image tokens, H]."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config = config
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))

    @torch.no_grad()
    def forward(self, pixels: Any) -> torch.Tensor:
        """Features of all images, one after the other; views beyond an image's own are padding."""
        counts = view_counts(self.config, pixels.image_sizes)
        views = [
            self.project(image[:count])
            for image, count in zip(pixels.pixel_values, counts, strict=True)
        ]
        return torch.cat(pack(self, views, pixels.image_sizes, self.image_newline))

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by their published names."""
        return super().published_parameters() | {"image_newline": self.image_newline}


def view_counts(config: Any, sizes: torch.Tensor) -> list[int]:
    """Views of each image: the whole one, and its tiles."""
    side = config.vision_config.image_size
    return [
        image_size_to_num_patches(size.tolist(), config.image_grid_pinpoints, side)
        for size in sizes
    ]


def pack(owner: Any, views: list[torch.Tensor], sizes: torch.Tensor, newline: Any) -> Any:
    """Features [views,tokens,H] of each image in the order the decoder reads them, [tokens,H].

    transformers' own function, which asks its model for nothing but its config (`owner.config`).
    """
    packed, _ = LlavaNextModel.pack_image_features(owner, views, sizes, "default", newline)
    return packed
