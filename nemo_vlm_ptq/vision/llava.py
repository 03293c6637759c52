"""LLaVA-1.5's way of looking: transformers' CLIP tower, one hidden state, two linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

TOWER = "vision_tower.vision_model."


class LlavaVision(nn.Module):
    """pixels [images,3,h,w] -> features [images,tokens,hidden of the decoder]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = config.vision_feature_layer
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of each image, without the class token."""
        hidden = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = [self.layer] if isinstance(self.layer, int) else self.layer
        return self.multi_modal_projector(torch.cat([hidden[i][:, 1:] for i in layers], dim=-1))

    def published(self) -> dict[str, torch.Tensor]:
        """Parameters by their published names, whatever this transformers calls them."""
        tower: dict[str, torch.Tensor] = {
            TOWER + name.removeprefix("vision_model."): tensor
            for name, tensor in self.vision_tower.named_parameters()
        }
        projector = {
            f"multi_modal_projector.{name}": tensor
            for name, tensor in self.multi_modal_projector.named_parameters()
        }
        return tower | projector

    def load(self, tensors: Mapping[str, torch.Tensor]) -> LlavaVision:
        """Copy published tensors in, in their dtype."""
        first = next(iter(tensors.values()))
        self.to(first.dtype).eval().requires_grad_(False)
        for name, parameter in self.published().items():
            parameter.data.copy_(tensors[name])
        return self
