"""InternVL3 and InternVL3.5 (-hf): images cut into tiles, and the decoder of Qwen2 or of Qwen3.

Parameters have the names of the published -hf checkpoints; NAME_ALIASES maps those of transformers
in memory to them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import (
    Config,
    Decoder,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
)
from nemo_vlm_ptq.families.chat_template import prompt_renderer, tokenize_prompt
from nemo_vlm_ptq.families.config_checks import check_token_id, require_positive, require_values
from nemo_vlm_ptq.families.folder_files import load_tokenizer, token_of_id
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.image_processor import load_image_processor
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, llama_parameter_map
from nemo_vlm_ptq.families.placeholders import expand_placeholders
from nemo_vlm_ptq.families.qwen_text import qwen_text_decoder
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.tied_head import make_config_completer
from nemo_vlm_ptq.families.tiles import tiles_of_tokens
from nemo_vlm_ptq.families.towers import merge_patches

BODY_PREFIX, HEAD_PREFIX = "language_model.model.", "language_model.lm_head."
IMAGE_PROCESSORS = ("GotOcr2ImageProcessor",)
MERGE = 2  # patches along a side that become one token
TILES_PER_CALL = 16

NAME_ALIASES = (
    (r"^model\.language_model\.", BODY_PREFIX),
    (r"^lm_head\.", HEAD_PREFIX),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)

full_config = full_config_reader("InternVLConfig")
text_config = text_config_reader(full_config)


class InternVLVision(nn.Module):
    """Vision tower and projector, applied to each tile."""

    def __init__(self, full: Any) -> None:
        from transformers.models.internvl.modeling_internvl import (
            InternVLMultiModalProjector,
            InternVLVisionModel,
        )

        super().__init__()
        self.vision_tower = InternVLVisionModel(full.vision_config)
        self.multi_modal_projector = InternVLMultiModalProjector(full)

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all tiles, concatenated."""
        parts = images.pixel_values.split(TILES_PER_CALL)
        return torch.cat([self._encode(tiles) for tiles in parts])

    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        patches = self.vision_tower(tiles).last_hidden_state[:, 1:]  # without the class token
        side = round(patches.shape[1] ** 0.5)
        merged = merge_patches(patches.unflatten(1, (side, side)))
        return self.multi_modal_projector(merged.flatten(0, 2))

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        return dict(self.named_parameters())


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    check_token_id(FAMILY.name, "image_token_id", full.image_token_id)
    _check_vision(full)
    return qwen_text_decoder(FAMILY.name, config, full.text_config)


def _check_vision(full: Any) -> None:
    """Reject vision settings that InternVLVision does not support."""
    vision = full.vision_config
    (height, width), (rows, columns) = vision.image_size, vision.patch_size
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    positive = {f"vision_config.{key}": getattr(vision, key) for key in sizes}
    positive |= {"vision_config.image_size": height, "vision_config.patch_size": rows}
    require_positive(FAMILY.name, positive, int)
    require_values(
        FAMILY.name,
        {
            "vision_config.model_type": (vision.model_type, "internvl_vision"),
            "width of vision_config.image_size": (width, height),
            "width of vision_config.patch_size": (columns, rows),
            "vision_config.num_channels": (vision.num_channels, 3),
            "downsample_ratio": (full.downsample_ratio, 1 / MERGE),
            "vision_feature_layer": (full.vision_feature_layer, -1),
            "vision_feature_select_strategy": (full.vision_feature_select_strategy, "default"),
        },
    )
    if height % (MERGE * rows):
        raise UserError(
            f"{FAMILY.name}: vision_config.image_size must be a multiple of {MERGE * rows}, "
            f"{MERGE} patches, got {height}"
        )
    require_values(
        FAMILY.name, {"image_seq_length": (full.image_seq_length, tokens_per_tile(full))}
    )


def make_vision_module(config: Config) -> InternVLVision:
    """Return the vision module, uninitialized."""
    return InternVLVision(full_config(config))


def tokens_per_tile(full: Any) -> int:
    """Return the number of image tokens of one tile."""
    vision = full.vision_config
    return int(vision.image_size[0] // (MERGE * vision.patch_size[0])) ** 2


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not a multiple of the tokens of one tile.
    """
    full = full_config(config)
    return tiles_of_tokens(ids == full.image_token_id, tokens_per_tile(full))


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of the folder's chat template."""
    tokenizer, full = load_tokenizer(folder), full_config(config)
    side, count = full.vision_config.image_size[0], tokens_per_tile(full)
    processor = load_image_processor(folder, IMAGE_PROCESSORS, side)
    token = token_of_id(folder, tokenizer, "image_token_id", full.image_token_id)
    render = prompt_renderer(folder, tokenizer, None, token)
    start = getattr(tokenizer, "start_image_token", "<img>")
    marked = start + token + getattr(tokenizer, "end_image_token", "</img>")

    def process(image: Any) -> ImageInputs:
        # InternVLProcessor cuts images into tiles whatever the image processor's settings say
        processed = processor(image, crop_to_patches=True, return_tensors="pt")
        return ImageInputs(processed["pixel_values"])

    def preprocess(
        sample_id: str, question: str, images: Any = None, answer: str = "", **_: Any
    ) -> Sample:
        parts = process_images(images, process)
        text = render(question, len(parts), answer)
        ids = tokenize_prompt(tokenizer, text.replace(token, marked))
        counts = [count * len(image) for image in parts]
        input_ids, is_image = expand_placeholders(sample_id, ids, full.image_token_id, counts)
        return Sample(sample_id, input_ids, is_image, join_images(parts))

    return preprocess


FAMILY = ModelFamily(
    name="internvl",
    architectures=("InternVLForConditionalGeneration",),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=NAME_ALIASES,
    ignored_tensors=(ROTARY_INV_FREQ,),
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="",
    most_tokens_per_image=13 * 256,  # 12 tiles and the image in the size of one
    is_tiled=True,
    other_repositories=(("InternVLChatModel", "the one of the same name that ends in -hf or -HF"),),
    complete_config=make_config_completer(HEAD_PREFIX, NAME_ALIASES, default=True),
)
