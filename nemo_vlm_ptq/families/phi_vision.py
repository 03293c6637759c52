"""Phi-3-vision's way of looking: an image cut into crops beside a view of the whole (HD transform).

Legend: S side of a crop, g = S/patch, m = g/2 tokens along a side of a crop, C channels of CLIP.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from nemo_vlm_ptq.families.towers import hidden_states, merge_patches, tower_names

EMBED = "model.vision_embed_tokens."
WHITE = (255, 255, 255)


class PhiVision(nn.Module):
    """views [images,crops+1,3,S,S] and sizes [images,2] -> features [image tokens, H].

    The first view is the whole image; views beyond an image's own are padding and not looked at.
    """

    def __init__(self, tower: dict[str, Any], hidden: int, layer: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(**tower)
        self.layer, self.side = layer, int(tower["image_size"])
        self.vision_tower = CLIPVisionModel(config)
        width = 4 * config.hidden_size
        self.glb_GN = nn.Parameter(torch.empty(1, 1, width))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, width))
        self.img_projection = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    @torch.no_grad()
    def forward(self, pixels: Any) -> torch.Tensor:
        """Features of all images, one after the other."""
        found = []
        for views, (height, width) in zip(pixels.pixel_values, pixels.image_sizes, strict=True):
            rows, columns = int(height) // self.side, int(width) // self.side
            found.append(self.project(views[None, : rows * columns + 1], rows, columns)[0])
        return torch.cat(found)

    def project(self, views: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[n,1+rows*columns,3,S,S] -> [n,tokens,H]: crops, a separator, the whole image."""
        n = len(views)
        x = hidden_states(self.vision_tower, views.flatten(0, 1), self.layer)[:, 1:]
        side = round(x.shape[1] ** 0.5)
        blocks = merge_patches(x.unflatten(1, (side, side))).unflatten(0, (n, -1))
        m = blocks.shape[2]
        crops = blocks[:, 1:].unflatten(1, (rows, columns)).transpose(2, 3)
        parts = [
            self._lines(crops.reshape(n, rows * m, columns * m, -1)),
            self.glb_GN.expand(n, 1, -1),
            self._lines(blocks[:, 0]),
        ]
        return self.img_projection(torch.cat(parts, dim=1))

    def _lines(self, grid: torch.Tensor) -> torch.Tensor:
        """[n,rows,columns,4C] read along its rows, a separator after each."""
        ends = self.sub_GN.expand(*grid.shape[:2], 1, -1)
        return torch.cat([grid, ends], dim=2).flatten(1, 2)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by their published names."""
        own = {
            EMBED + name: tensor
            for name, tensor in self.named_parameters()
            if not name.startswith("vision_tower.")
        }
        return tower_names(EMBED + "img_processor.", self.vision_tower) | own


def token_count(height: int, width: int, side: int, m: int) -> int:
    """Tokens of an image whose padded size is height x width."""
    rows, columns = height // side, width // side
    return (rows * columns + 1) * m * m + 1 + (rows + 1) * m


def crop_image(
    image: PIL.Image.Image, crops: int, side: int, mean: list[float], std: list[float]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Views [crops+1,3,S,S] of a picture, zero beyond its own, and its padded (height, width).

    The picture is scaled to cover at most `crops` squares, and padded with white above and below;
    a tall one is laid on its side for that, and set upright again.
    """
    padded = _fit(image.convert("RGB"), crops, side)
    array = np.asarray(padded, dtype=np.float32).transpose(2, 0, 1) / 255
    pixels = torch.from_numpy(array)
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    own = global_view_and_crops(pixels[None], side)[0]
    views = torch.zeros(crops + 1, 3, side, side)
    views[: len(own)] = own
    return views, (padded.height, padded.width)


def global_view_and_crops(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """[n,3,h,w] of whole squares -> [n,1+crops,3,S,S]: all of it made small, and its squares."""
    whole = functional.interpolate(pixels, size=(side, side), mode="bicubic")
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    crops = pixels.unflatten(3, (columns, side)).unflatten(2, (rows, side))
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([whole[:, None], crops], dim=1)


def _fit(image: PIL.Image.Image, crops: int, side: int) -> PIL.Image.Image:
    """The picture, scaled and padded to whole squares."""
    tall = image.width < image.height
    if tall:
        image = image.transpose(PIL.Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = 1
    while scale * math.ceil(scale / ratio) <= crops:
        scale += 1
    width = (scale - 1) * side
    height = max(1, int(width / ratio))
    image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    whole = -(-height // side) * side
    padded = PIL.Image.new("RGB", (width, whole), WHITE)
    padded.paste(image, (0, (whole - height) // 2))
    return padded.transpose(PIL.Image.Transpose.TRANSPOSE) if tall else padded
