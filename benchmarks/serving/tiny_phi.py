"""Lets vLLM 0.22 serve tiny-phi: what its code takes for granted of Phi-3-vision is told otherwise.

vLLM's phi3v.py has written into it the sizes of CLIP-L/14-336, 24 x 24 patches of 1,024 channels,
crops of 336 pixels, and the token 32044 for images. tiny-phi has a small tower, crops of 32 pixels
and 512 tokens. The decoder, which is what is quantized, is vLLM's own, as are the loading of
weights, the tower's layers, the projector and the order of crops and separators. A published
Phi-3-vision brings its processor along as Python code; tiny-phi has none, so one is given here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPVisionConfig,
    Phi3Config,
    ProcessorMixin,
)

from nemo_vlm_ptq.families.phi_vision import crop_image, token_count
from nemo_vlm_ptq.families.towers import merge_patches
from nemo_vlm_ptq.workdir.store import read_json

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny-phi"
TOKEN = 2  # stands for an image token until its features take the place: <pad>
THEIRS = 336  # pixels of a crop in vLLM's code


class Phi3VConfig(Phi3Config):
    """config.json of Phi-3-vision."""

    model_type = "phi3_v"


class Phi3VProcessor(ProcessorMixin):
    """Text with <|image_i|> and pictures -> input_ids, pixel_values, image_sizes.

    Pieces of text beside an image are tokenized apart and image i is -i, as the published one does.
    """

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"
    img_tokens = tuple(f"<|image_{i}|>" for i in range(1, 10))

    def __init__(self, tokenizer: Any, settings: dict[str, Any]) -> None:
        super().__init__(tokenizer)
        self.settings = settings

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> Phi3VProcessor:
        """Tokenizer and settings of a folder."""
        settings = read_json(Path(folder) / "preprocessor_config.json")
        return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), settings)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Image tokens of a picture."""
        return self._tokens(self._cut(PIL.Image.new("RGB", (width, height)))[1])

    def _cut(self, image: PIL.Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        given = self.settings
        return crop_image(
            image, given["num_crops"], side(), given["image_mean"], given["image_std"]
        )

    def _tokens(self, size: tuple[int, int]) -> int:
        return token_count(*size, side(), side() // tower()["patch_size"] // 2)

    def __call__(self, text: Any, images: Any = None, **_: Any) -> BatchFeature:
        """One text, and its pictures."""
        text = text if isinstance(text, str) else text[0]
        images = [] if images is None else images
        found = [self._cut(image) for image in (images if isinstance(images, list) else [images])]
        ids: list[int] = []
        for index, (_views, size) in enumerate(found):
            before, _, text = text.partition(self.img_tokens[index])
            ids += self.tokenizer(before)["input_ids"] + [-1 - index] * self._tokens(size)
        ids += self.tokenizer(text)["input_ids"]
        data: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if found:
            data["pixel_values"] = torch.stack([views for views, _ in found])
            crops = torch.tensor([size for _, size in found]) // side()
            data["image_sizes"] = crops * THEIRS
        return BatchFeature(data)


def tower() -> dict[str, Any]:
    """Sizes of tiny-phi's tower."""
    return read_json(TINY / "config.json")["img_processor"]["vision_config"]


def side() -> int:
    """Pixels of a crop."""
    return int(tower()["image_size"])


def merged(_: Any, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """vLLM's reshape_hd_patches_2x2merge for any tower: [n,patches,C] -> [images,h,w,4C]."""
    width = round(features.shape[1] ** 0.5)
    blocks = merge_patches(features.unflatten(1, (width, width)))
    lines = blocks.unflatten(0, (-1, int(rows), int(columns))).transpose(2, 3)
    return lines.flatten(3, 4).flatten(1, 2)


def fit_vllm() -> None:
    """Change vLLM's constants, in this process."""
    from vllm.model_executor.models import phi3v

    AutoConfig.register("phi3_v", Phi3VConfig)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor)
    phi3v.CLIP_VIT_LARGE_PATCH14_336_CONFIG = CLIPVisionConfig(**tower())
    phi3v._IMAGE_TOKEN_ID = TOKEN
    phi3v.Phi3HDImageEmbedding.reshape_hd_patches_2x2merge = merged
