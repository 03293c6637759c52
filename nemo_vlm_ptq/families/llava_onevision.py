"""LLaVA-OneVision: a SigLIP tower over the image and its tiles, and the decoder of Qwen2.

Tiles are arranged as in LLaVA-NeXT, and reduced where an image has more than the config allows.
Parameters have the names of the published llava-onevision-*-hf checkpoints.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import llava, llava_next
from nemo_vlm_ptq.families.base import (
    Config,
    Decoder,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
)
from nemo_vlm_ptq.families.chat_template import prompt_renderer
from nemo_vlm_ptq.families.config_checks import (
    check_feature_layer,
    check_token_id,
    check_tower_sizes,
    require_values,
)
from nemo_vlm_ptq.families.folder_files import load_tokenizer, token_of_id
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.llama import llama_parameter_map
from nemo_vlm_ptq.families.qwen_text import qwen_text_decoder
from nemo_vlm_ptq.families.tied_head import make_config_completer
from nemo_vlm_ptq.families.towers import select_hidden_states, tower_parameters

IMAGE_PROCESSORS = ("LlavaOnevisionImageProcessor",)
ASPECT_RATIO = re.compile(r"anyres_max_[1-9]\d{0,2}")

full_config = full_config_reader("LlavaOnevisionConfig")
text_config = text_config_reader(full_config)


class LlavaOnevisionVision(nn.Module):
    """Vision tower and projector, applied to the resized image and to its tiles.

    A learned newline feature ends each row of the tiles' features.
    """

    def __init__(self, full: Any) -> None:
        from transformers import SiglipVisionModel
        from transformers.models.llava_onevision.modeling_llava_onevision import (
            LlavaOnevisionMultiModalProjector,
        )

        super().__init__()
        self.config = full
        self.vision_tower = SiglipVisionModel(full.vision_config)
        self.multi_modal_projector = LlavaOnevisionMultiModalProjector(full)
        self.image_newline = nn.Parameter(torch.empty(full.text_config.hidden_size))

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, concatenated.

        pixel_values [images,views,3,h,w] are padded to the most views of an image.
        """
        assert images.image_sizes is not None
        counts = llava_next.view_counts(self.config, images.image_sizes)
        features = [
            self._encode(views[:count])
            for views, count in zip(images.pixel_values, counts, strict=True)
        ]
        packed = pack_features(self.config, features, images.image_sizes, self.image_newline)
        return torch.cat(packed)

    def _encode(self, views: torch.Tensor) -> torch.Tensor:
        layer = self.config.vision_feature_layer
        return self.multi_modal_projector(select_hidden_states(self.vision_tower, views, layer))

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        projector = self.multi_modal_projector.named_parameters(prefix="multi_modal_projector")
        tower = tower_parameters("vision_tower.", self.vision_tower)
        return tower | dict(projector) | {"image_newline": self.image_newline}


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    vision, ratio = full.vision_config, str(full.vision_aspect_ratio)
    require_values(
        FAMILY.name,
        {
            "vision_config.model_type": (vision.model_type, "siglip_vision_model"),
            "vision_feature_select_strategy": (full.vision_feature_select_strategy, "full"),
        },
    )
    check_tower_sizes(FAMILY.name, vision)
    check_feature_layer(FAMILY.name, full.vision_feature_layer, vision.num_hidden_layers)
    if not ASPECT_RATIO.fullmatch(ratio):
        raise UserError(
            f"{FAMILY.name}: vision_aspect_ratio must be anyres_max_N, N a number of tiles from 1 "
            f"to 999, got {ratio!r}"
        )
    check_token_id(FAMILY.name, "image_token_index", full.image_token_index)
    return qwen_text_decoder(FAMILY.name, config, full.text_config)


def make_vision_module(config: Config) -> LlavaOnevisionVision:
    """Return the vision module, uninitialized."""
    return LlavaOnevisionVision(full_config(config))


def pack_features(
    full: Any, features: list[torch.Tensor], image_sizes: torch.Tensor, newline: torch.Tensor
) -> list[torch.Tensor]:
    """Arrange the features [views,tokens,H] of each image as the decoder expects them, [tokens,H].

    transformers' method reads nothing of its model but the config.
    """
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    model: Any = SimpleNamespace(config=full)
    pack, ratio = LlavaOnevisionModel.pack_image_features, full.vision_aspect_ratio
    packed, _ = pack(model, features, image_sizes, newline, ratio)
    return packed


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not that of the next images, or there are tokens of videos.
    """
    full = full_config(config)
    if bool((ids == full.video_token_index).any()):
        raise UserError("videos are not supported")
    return llava_next.find_views(full, ids, images, pack_features)


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of the folder's chat template."""
    tokenizer, full = load_tokenizer(folder), full_config(config)
    processor = llava_next.load_views_processor(folder, IMAGE_PROCESSORS, full)
    token = token_of_id(folder, tokenizer, "image_token_index", full.image_token_index)
    render = prompt_renderer(folder, tokenizer, None, token)
    return llava_next.preprocess_views(tokenizer, processor, render, full, pack_features)


FAMILY = ModelFamily(
    name="llava_onevision",
    architectures=("LlavaOnevisionForConditionalGeneration",),
    body_prefix=llava.BODY_PREFIX,
    head_prefix=llava.HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=llava.BODY_PREFIX, head=llava.HEAD_PREFIX),
    name_aliases=llava_next.NAME_ALIASES,
    ignored_tensors=llava.IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    takes_several_images=False,  # it would not cut them into tiles
    find_placeholders=find_placeholders,
    trtllm_vision_type="",
    most_tokens_per_image=8154,  # 10 tiles of 729, with newlines, and the resized image
    other_repositories=(("LlavaQwenForCausalLM", llava.HF_REPOSITORY),),
    complete_config=make_config_completer(
        llava.HEAD_PREFIX, llava_next.NAME_ALIASES, default=False
    ),
)
