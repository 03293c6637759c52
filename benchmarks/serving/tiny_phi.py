"""Patch vLLM 0.22 so that it serves tiny-phi.

vLLM's phi3v.py hard-codes the sizes of the published Phi-3-vision: CLIP-L/14-336, 24 x 24 patches
of 1024 channels, crops of 336 pixels, and image token 32044. tiny-phi has a small vision tower,
crops of 32 pixels and a vocabulary of 512. Everything else is vLLM's code: the quantized decoder,
weight loading, the layers of the vision tower, the projector, and the order of crops and
separators. The published Phi-3-vision contains its processor as Python code; tiny-phi
contains none, so this module provides one.
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

from nemo_vlm_ptq.families.hd_transform import crop_image, token_count
from nemo_vlm_ptq.families.towers import merge_patches
from nemo_vlm_ptq.workdir.store import read_json

TINY_PHI = Path(__file__).resolve().parents[2] / "assets" / "tiny-phi"
IMAGE_TOKEN_ID = 2  # <pad>; its embeddings are replaced by image features
VLLM_CROP_SIDE = 336  # pixels of a crop in vLLM's code


class Phi3VConfig(Phi3Config):
    """Config of Phi-3-vision."""

    model_type = "phi3_v"


class Phi3VProcessor(ProcessorMixin):
    """Processor of text with <|image_i|> and images to input_ids, pixel_values and image_sizes.

    As in the published processor, the text between images is tokenized separately, and the tokens
    of image i have the id -i.
    """

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"
    img_tokens = tuple(f"<|image_{i}|>" for i in range(1, 10))

    def __init__(self, tokenizer: Any, settings: dict[str, Any]) -> None:
        super().__init__(tokenizer)
        self.settings = settings

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> Phi3VProcessor:
        """Load the tokenizer and the preprocessor settings of a folder."""
        settings = read_json(Path(folder) / "preprocessor_config.json")
        return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), settings)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Return the number of image tokens of an image."""
        _, size = self._crop(PIL.Image.new("RGB", (width, height)))
        return self._token_count(size)

    def _crop(self, image: PIL.Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the views of an image and its padded (height, width)."""
        settings = self.settings
        return crop_image(
            image,
            settings["num_crops"],
            crop_side(),
            settings["image_mean"],
            settings["image_std"],
        )

    def _token_count(self, size: tuple[int, int]) -> int:
        return token_count(*size, crop_side(), crop_side() // tower_config()["patch_size"] // 2)

    def __call__(self, text: Any, images: Any = None, **_: Any) -> BatchFeature:
        """Preprocess one text and its images."""
        text = text if isinstance(text, str) else text[0]
        images = [] if images is None else images
        images = images if isinstance(images, list) else [images]
        cropped = [self._crop(image) for image in images]
        ids: list[int] = []
        for index, (_, size) in enumerate(cropped):
            before, _, text = text.partition(self.img_tokens[index])
            ids += self.tokenizer(before)["input_ids"] + [-1 - index] * self._token_count(size)
        ids += self.tokenizer(text)["input_ids"]
        data: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if cropped:
            data["pixel_values"] = torch.stack([views for views, _ in cropped])
            crops = torch.tensor([size for _, size in cropped]) // crop_side()
            data["image_sizes"] = crops * VLLM_CROP_SIDE
        return BatchFeature(data)


def tower_config() -> dict[str, Any]:
    """Return the config of tiny-phi's vision tower."""
    return read_json(TINY_PHI / "config.json")["img_processor"]["vision_config"]


def crop_side() -> int:
    """Return the side of a crop in pixels."""
    return int(tower_config()["image_size"])


def reshape_and_merge_patches(
    _: Any, features: torch.Tensor, rows: int, columns: int
) -> torch.Tensor:
    """Replace vLLM's reshape_hd_patches_2x2merge for vision towers of any size.

    Args:
        features: [n,patches,C], of the crops of all images.
        rows: rows of crops of an image.
        columns: columns of crops of an image.

    Returns:
        [images,h,w,4C], patches in the order of the image.
    """
    side = round(features.shape[1] ** 0.5)
    blocks = merge_patches(features.unflatten(1, (side, side)))
    lines = blocks.unflatten(0, (-1, int(rows), int(columns))).transpose(2, 3)
    return lines.flatten(3, 4).flatten(1, 2)


def patch_vllm() -> None:
    """Replace vLLM's constants in this process."""
    from vllm.model_executor.models import phi3v

    AutoConfig.register("phi3_v", Phi3VConfig)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor)
    phi3v.CLIP_VIT_LARGE_PATCH14_336_CONFIG = CLIPVisionConfig(**tower_config())
    phi3v._IMAGE_TOKEN_ID = IMAGE_TOKEN_ID
    phi3v.Phi3HDImageEmbedding.reshape_hd_patches_2x2merge = reshape_and_merge_patches
