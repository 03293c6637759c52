"""LLaVA-1.5's way of looking: transformers' CLIP tower, one hidden state, two linears."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from nemo_vlm_ptq.families.towers import hidden_states, tower_names


class LlavaVision(nn.Module):
    """views [images,3,h,w] -> features [image tokens, hidden of the decoder]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = config.vision_feature_layer
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)

    def project(self, views: torch.Tensor) -> torch.Tensor:
        """Features [n,tokens,H] of each view, without the class token."""
        seen = hidden_states(self.vision_tower, views, self.layer)
        return self.multi_modal_projector(seen[:, 1:])

    @torch.no_grad()
    def forward(self, pixels: Any) -> torch.Tensor:
        """Features of all images, one after the other."""
        return self.project(pixels.pixel_values).flatten(0, 1)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by their published names."""
        projector = {
            f"multi_modal_projector.{name}": tensor
            for name, tensor in self.multi_modal_projector.named_parameters()
        }
        return tower_names("vision_tower.", self.vision_tower) | projector
