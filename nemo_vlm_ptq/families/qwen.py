"""What the Qwen-VL families share: a tower over patches of images of any size, and the prompt.

Legend: S tokens, H hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Config, ImageInputs, ImagePlaceholders, Preprocess, Sample
from nemo_vlm_ptq.families.chat_template import prompt_renderer, tokenize_prompt
from nemo_vlm_ptq.families.config_checks import (
    check_patch_tower,
    check_token_id,
    require_positive,
    require_values,
)
from nemo_vlm_ptq.families.decoder import Decoder, MRope
from nemo_vlm_ptq.families.folder_files import load_tokenizer, token_of_id
from nemo_vlm_ptq.families.full_config import ConfigReader
from nemo_vlm_ptq.families.image_processor import load_patch_processor
from nemo_vlm_ptq.families.llama import decoder_from_sizes
from nemo_vlm_ptq.families.mrope import mrope_positions
from nemo_vlm_ptq.families.placeholders import expand_placeholders, images_of_tokens
from nemo_vlm_ptq.families.several_images import join_images, process_images

IMAGE_PROCESSORS = ("Qwen2VLImageProcessor",)


class QwenVision(nn.Module):
    """Vision tower of a Qwen-VL model, merger included.

    Args:
        tower: transformers' module.
        prefix: of its published names.
        width: numbers per image token, those for deepstack included.
    """

    def __init__(self, tower: Any, prefix: str, width: int) -> None:
        super().__init__()
        self.visual, self._prefix, self._width = tower, prefix, width
        self._merge: int = tower.spatial_merge_size

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,width] of all images, those for deepstack last."""
        pixels, grids = images.pixel_values, images.grids
        assert grids is not None
        if pixels.is_meta:  # the tower computes with the values of grids
            tokens = int(grids.prod(dim=1).sum()) // self._merge**2
            return pixels.new_empty(tokens, self._width)
        encoded = self.visual(pixels, grid_thw=grids.to(pixels.device))
        deeper = getattr(encoded, "deepstack_features", None) or []
        return torch.cat([encoded.pooler_output, *deeper], dim=-1)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        return {self._prefix + name: value for name, value in self.visual.named_parameters()}


def qwen_decoder(family: str, full: Any, *, interleaved: bool, is_partial: bool = False) -> Decoder:
    """Return the decoder of a Qwen-VL config, without what only some of them have.

    Args:
        family: name of the family, for messages.
        full: transformers' config of the whole model.
        interleaved: how the family's attention deals frequencies out to the three positions.
        is_partial: whether the family rotates a part of each head.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    text = full.text_config
    rope = dict(text.to_dict().get("rope_parameters") or {})
    sections = tuple(rope.get("mrope_section") or ())
    check_token_id(family, "image_token_id", full.image_token_id)
    check_patch_tower(family, full.vision_config)
    decoder = decoder_from_sizes(family, text, rope.get("rope_theta", 10000.0))
    factor = rope.get("partial_rotary_factor", 1.0)
    require_positive(family, {"partial_rotary_factor": factor}, float)
    rotary_dim = int(decoder.head_dim * factor)
    require_values(
        family,
        {
            "text_config.hidden_act": (text.hidden_act, "silu"),
            "rope type": (rope.get("rope_type", "default"), "default"),
            "mrope_interleaved": (bool(rope.get("mrope_interleaved", False)), interleaved),
            "numbers in mrope_section": (len(sections), 3),
            "mrope_section of other than integers": (
                [n for n in sections if type(n) is not int],
                [],
            ),
            "mrope_section below 0": ([n for n in sections if n < 0], []),
            "partial_rotary_factor": (factor, min(factor, 1.0) if is_partial else 1.0),
            "rotated numbers of a head % 2": (rotary_dim % 2, 0),
            "sum of mrope_section": (sum(sections), rotary_dim // 2),
            "vision_config.out_hidden_size": (_output_size(full.vision_config), decoder.hidden),
        },
    )
    mrope = MRope(sections=(sections[0], sections[1], sections[2]), interleaved=interleaved)
    part = rotary_dim if rotary_dim < decoder.head_dim else None
    tied = bool(full.tie_word_embeddings)
    return replace(decoder, mrope=mrope, rotary_dim=part, tied_head=tied)


def _output_size(vision_config: Any) -> int:
    size = getattr(vision_config, "out_hidden_size", None)
    return int(vision_config.hidden_size if size is None else size)


def make_placeholder_finder(
    full_config: ConfigReader,
) -> Callable[[Config, Any, ImageInputs | None], ImagePlaceholders]:
    """Return the function that finds image tokens, which the published processor has expanded."""

    def find(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
        full = full_config(config)
        if bool((ids == full.video_token_id).any()):
            raise UserError("videos are not supported")
        counts = [] if images is None else token_counts(images, full)
        return images_of_tokens(ids == full.image_token_id, counts, "image_grid_thw")

    return find


def make_positions(
    full_config: ConfigReader,
) -> Callable[[Config, torch.Tensor, ImageInputs | None], torch.Tensor]:
    """Return the function that computes the positions [3,S] of a sample's tokens."""

    def positions(
        config: Config, is_image: torch.Tensor, images: ImageInputs | None
    ) -> torch.Tensor:
        merge = full_config(config).vision_config.spatial_merge_size
        return mrope_positions(is_image, None if images is None else images.grids, merge)

    return positions


def token_counts(images: ImageInputs, full: Any) -> list[int]:
    """Return the image tokens of each image.

    Raises:
        UserError: there is no grid.
    """
    if images.grids is None:
        raise UserError("pixel_values need image_grid_thw [images,3]")
    merge = full.vision_config.spatial_merge_size
    return [int(count) for count in images.grids.prod(dim=1) // merge**2]


def make_pixels_per_token(full_config: ConfigReader) -> Callable[[Config], int]:
    """Return the function that computes the pixels of an image that become one token."""

    def pixels_per_token(config: Config) -> int:
        vision = full_config(config).vision_config
        return int((vision.patch_size * vision.spatial_merge_size) ** 2)

    return pixels_per_token


def _bounded_size(size: Any, max_pixels: int | None) -> dict[str, int]:
    """Return the areas that images are resized to at least and at most, in pixels."""
    least, most = size["shortest_edge"], size["longest_edge"]
    most = most if max_pixels is None else min(most, max_pixels)
    return {"shortest_edge": min(least, most), "longest_edge": most}


def make_preprocessor_factory(full_config: ConfigReader) -> Callable[[Path, Config], Preprocess]:
    """Return the function that makes a family's `preprocess`."""

    def make_preprocessor(folder: Path, config: Config) -> Preprocess:
        tokenizer, full = load_tokenizer(folder), full_config(config)
        vision = full.vision_config
        processor = load_patch_processor(folder, IMAGE_PROCESSORS, vision)
        token = token_of_id(folder, tokenizer, "image_token_id", full.image_token_id)
        render = prompt_renderer(folder, tokenizer, None, token)

        def process(image: Any, max_pixels: int | None) -> ImageInputs:
            size = _bounded_size(processor.size, max_pixels)
            processed = processor(image, size=size, return_tensors="pt")
            return ImageInputs(processed["pixel_values"], grids=processed["image_grid_thw"])

        def preprocess(
            sample_id: str,
            question: str,
            images: Any = None,
            answer: str = "",
            *,
            max_pixels: int | None = None,
        ) -> Sample:
            parts = process_images(images, partial(process, max_pixels=max_pixels))
            joined = join_images(parts)
            ids = tokenize_prompt(tokenizer, render(question, len(parts), answer))
            counts = [] if joined is None else token_counts(joined, full)
            input_ids, is_image = expand_placeholders(sample_id, ids, full.image_token_id, counts)
            grids = None if joined is None else joined.grids
            positions = mrope_positions(is_image, grids, vision.spatial_merge_size)
            return Sample(sample_id, input_ids, is_image, joined, positions)

        return preprocess

    return make_preprocessor
