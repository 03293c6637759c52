"""LLaVA-1.5: a CLIP vision tower, a projector of two linears, a Llama decoder.

Parameters have the names of the published llava-hf checkpoints. NAME_ALIASES maps the names of
transformers 4.5x (in memory) and transformers 5 (without `vision_model.`) to them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.families.base import (
    Config,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
)
from nemo_vlm_ptq.families.chat_template import prompt_renderer, tokenize_prompt
from nemo_vlm_ptq.families.config_checks import (
    check_feature_layer,
    check_token_id,
    check_tower_sizes,
    require_values,
)
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.image_processor import load_image_processor
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, llama_decoder, llama_parameter_map
from nemo_vlm_ptq.families.placeholders import expand_placeholders
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.tiles import tiles_of_tokens
from nemo_vlm_ptq.families.towers import select_hidden_states, tower_parameters
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor

BODY_PREFIX, HEAD_PREFIX = "language_model.model.", "language_model.lm_head."
PROMPT = "USER: {image}{question} ASSISTANT:"
HF_REPOSITORY = "the one of llava-hf whose name ends in -hf"
IMAGE_PROCESSORS = ("LlavaImageProcessor", "CLIPImageProcessor")

NAME_ALIASES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)

IGNORED_TENSORS = (
    ROTARY_INV_FREQ,
    IgnoredTensor(pattern=r".*\.embeddings\.position_ids", reason="the integers from 0"),
)

full_config = full_config_reader("LlavaConfig")
text_config = text_config_reader(full_config)


class LlavaVision(nn.Module):
    """CLIP vision tower and projector of LLaVA-1.5."""

    def __init__(self, config: Any) -> None:
        from transformers import CLIPVisionModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        super().__init__()
        self.feature_layer = config.vision_feature_layer
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)

    def encode_views(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features [n,tokens,H] of views [n,3,h,w], without the class token."""
        states = select_hidden_states(self.vision_tower, pixel_values, self.feature_layer)
        return self.multi_modal_projector(states[:, 1:])

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, concatenated."""
        return self.encode_views(images.pixel_values).flatten(0, 1)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        projector = {
            f"multi_modal_projector.{name}": tensor
            for name, tensor in self.multi_modal_projector.named_parameters()
        }
        return tower_parameters("vision_tower.", self.vision_tower) | projector


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    check_clip_vision(FAMILY.name, full)
    require_values(FAMILY.name, {"text_config.model_type": (full.text_config.model_type, "llama")})
    check_token_id(FAMILY.name, "image_token_index", full.image_token_index)
    return llama_decoder(FAMILY.name, full.text_config)


def check_clip_vision(family: str, full: Any) -> None:
    """Reject vision settings that LlavaVision does not support.

    Raises:
        UserError: another vision tower, another selection of its features, or tied embeddings.
    """
    require_values(
        family,
        {
            "tie_word_embeddings": (full.tie_word_embeddings, False),
            "vision_config.model_type": (full.vision_config.model_type, "clip_vision_model"),
            "vision_feature_select_strategy": (full.vision_feature_select_strategy, "default"),
        },
    )
    check_tower_sizes(family, full.vision_config)
    depth = full.vision_config.num_hidden_layers
    check_feature_layer(family, full.vision_feature_layer, depth)


def make_vision_module(config: Config) -> LlavaVision:
    """Return the vision module, uninitialized."""
    return LlavaVision(full_config(config))


def tokens_per_image(config: Config) -> int:
    """Return the number of image tokens of one image."""
    vision_config = full_config(config).vision_config
    grid = vision_config.image_size // vision_config.patch_size
    return grid * grid


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not a multiple of the tokens of one image.
    """
    is_image = ids == full_config(config).image_token_index
    return tiles_of_tokens(is_image, tokens_per_image(config), "image")


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of LLaVA-1.5 by default."""
    tokenizer = load_tokenizer(folder)
    full, count = full_config(config), tokens_per_image(config)
    processor = load_image_processor(folder, IMAGE_PROCESSORS, full.vision_config.image_size)
    render = prompt_renderer(folder, tokenizer, PROMPT, "<image>")

    def process(image: Any) -> ImageInputs:
        return ImageInputs(processor(image, return_tensors="pt")["pixel_values"])

    def preprocess(
        sample_id: str, question: str, images: Any = None, answer: str = "", **_: Any
    ) -> Sample:
        parts = process_images(images, process)
        ids = tokenize_prompt(tokenizer, render(question, len(parts), answer))
        counts = [count] * len(parts)
        input_ids, is_image = expand_placeholders(sample_id, ids, full.image_token_index, counts)
        return Sample(sample_id, input_ids, is_image, join_images(parts))

    return preprocess


FAMILY = ModelFamily(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="LlamaForCausalLM",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=NAME_ALIASES,
    ignored_tensors=IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="llava",
    tokens_per_image=tokens_per_image,
    nemo_supported=True,
    other_repositories=(("LlavaLlamaForCausalLM", HF_REPOSITORY),),
)
