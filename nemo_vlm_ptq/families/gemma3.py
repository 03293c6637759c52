"""Gemma 3: a SigLIP tower whose patches are averaged, and a decoder with sliding windows.

Parameters have the names of the published checkpoints, which are those of LLaVA-1.5.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import llava
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
from nemo_vlm_ptq.families.config_checks import (
    check_token_id,
    check_tower_sizes,
    require_positive,
    require_values,
)
from nemo_vlm_ptq.families.decoder import ScaledRope, SlidingWindow
from nemo_vlm_ptq.families.folder_files import load_tokenizer, token_of_id
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.image_processor import load_image_processor, read_settings
from nemo_vlm_ptq.families.llama import decoder_from_sizes, llama_parameter_map
from nemo_vlm_ptq.families.placeholders import expand_placeholders
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.tied_head import make_config_completer
from nemo_vlm_ptq.families.tiles import tiles_of_tokens
from nemo_vlm_ptq.families.towers import tower_parameters

IMAGE_PROCESSORS = ("Gemma3ImageProcessor",)
FULL, SLIDING = "full_attention", "sliding_attention"

full_config = full_config_reader("Gemma3Config")
text_config = text_config_reader(full_config)


class Gemma3Vision(nn.Module):
    """Vision tower and projector, which averages square blocks of patches."""

    def __init__(self, full: Any) -> None:
        from transformers import SiglipVisionModel
        from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

        super().__init__()
        self.vision_tower = SiglipVisionModel(full.vision_config)
        self.multi_modal_projector = Gemma3MultiModalProjector(full)

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, concatenated."""
        states = self.vision_tower(images.pixel_values).last_hidden_state
        return self.multi_modal_projector(states).flatten(0, 1)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        projector = self.multi_modal_projector.named_parameters(prefix="multi_modal_projector")
        return tower_parameters("vision_tower.", self.vision_tower) | dict(projector)


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    text = full.text_config
    require_values(
        FAMILY.name,
        {
            "text_config.model_type": (text.model_type, "gemma3_text"),
            "text_config.hidden_activation": (text.hidden_activation, "gelu_pytorch_tanh"),
            "text_config.attention_bias": (text.attention_bias, False),
            "text_config.attn_logit_softcapping": (text.attn_logit_softcapping, None),
            "text_config.final_logit_softcapping": (text.final_logit_softcapping, None),
            "text_config.use_bidirectional_attention": (
                bool(text.use_bidirectional_attention),
                False,
            ),
        },
    )
    scale = {"text_config.query_pre_attn_scalar": text.query_pre_attn_scalar}
    require_positive(FAMILY.name, scale, float)
    _check_vision(full)
    ropes = {kind: _read_rope(text, kind) for kind in (FULL, SLIDING)}
    plain = decoder_from_sizes(FAMILY.name, text, ropes[FULL][0], has_sliding_window=True)
    return replace(
        plain,
        sliding_window=_read_sliding_window(text, *ropes[SLIDING]),
        scaled_rope=_scaled_rope(plain.head_dim, *ropes[FULL]),
        qk_norm=True,
        zero_centered_norms=True,
        post_norms=True,
        activation="gelu_tanh",
        attention_scale=text.query_pre_attn_scalar**-0.5,
        scaled_embedding=True,
        bidirectional_images="all",
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )


def _read_rope(text: Any, kind: str) -> tuple[Any, Any]:
    """Return base and factor of the rotary embedding of a kind of layer."""
    rope = dict(text.rope_parameters[kind])
    values = {"rope_theta": rope.get("rope_theta"), "factor": rope.get("factor", 1.0)}
    name = rope.get("rope_type", "default")
    if name not in ("default", "linear"):
        raise UserError(
            f"{FAMILY.name}: rope type of {kind} is {name!r}; supported: default, linear"
        )
    require_positive(FAMILY.name, {f"{key} of {kind}": one for key, one in values.items()}, float)
    require_values(
        FAMILY.name, {f"partial_rotary_factor of {kind}": (rope.get("partial_rotary_factor", 1), 1)}
    )
    return values["rope_theta"], values["factor"] if name == "linear" else 1.0


def _scaled_rope(head_dim: int, rope_theta: float, factor: float) -> ScaledRope:
    """Return the frequencies of layers with full attention, divided by a factor."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    frequencies = 1.0 / (rope_theta**exponents) / factor
    return ScaledRope(frequencies=tuple(frequencies.tolist()), attention_factor=1.0)


def _read_sliding_window(text: Any, rope_theta: Any, factor: Any) -> SlidingWindow:
    """Return the sliding window, and which layers have it."""
    kinds = list(text.layer_types)
    require_values(
        FAMILY.name,
        {
            "kinds in layer_types": (sorted({FULL, SLIDING, *map(str, kinds)}), [FULL, SLIDING]),
            f"factor of {SLIDING}": (factor, 1.0),
        },
    )
    require_positive(FAMILY.name, {"text_config.sliding_window": text.sliding_window}, int)
    return SlidingWindow(
        size=text.sliding_window,
        layers=tuple(kind == SLIDING for kind in kinds),
        rope_theta=rope_theta,
    )


def _check_vision(full: Any) -> None:
    """Reject vision settings that Gemma3Vision does not support."""
    vision, count = full.vision_config, full.mm_tokens_per_image
    check_token_id(FAMILY.name, "image_token_index", full.image_token_index)
    check_token_id(FAMILY.name, "boi_token_index", full.boi_token_index)
    check_token_id(FAMILY.name, "eoi_token_index", full.eoi_token_index)
    check_tower_sizes(FAMILY.name, vision)
    require_positive(FAMILY.name, {"mm_tokens_per_image": count}, int)
    require_values(
        FAMILY.name,
        {
            "vision_config.model_type": (vision.model_type, "siglip_vision_model"),
            "vision_config.vision_use_head": (getattr(vision, "vision_use_head", True), False),
        },
    )
    side, patches = round(count**0.5), vision.image_size // vision.patch_size
    if side * side != count or patches % side:
        raise UserError(
            f"{FAMILY.name}: mm_tokens_per_image must be the square of a divisor of {patches}, the "
            f"patches along a side, got {count}"
        )


def make_vision_module(config: Config) -> Gemma3Vision:
    """Return the vision module, uninitialized."""
    return Gemma3Vision(full_config(config))


def tokens_per_image(config: Config) -> int:
    """Return the number of image tokens of one image."""
    return int(full_config(config).mm_tokens_per_image)


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not a multiple of the tokens of one image.
    """
    full = full_config(config)
    return tiles_of_tokens(ids == full.image_token_index, full.mm_tokens_per_image, "image")


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of the folder's chat template."""
    tokenizer, full = load_tokenizer(folder), full_config(config)
    path, settings = read_settings(folder)
    if settings.get("do_pan_and_scan"):
        raise UserError(f"{path}: do_pan_and_scan is true; only false is supported")
    processor = load_image_processor(folder, IMAGE_PROCESSORS, full.vision_config.image_size)
    image_id = full.image_token_index
    start, token, end = (
        token_of_id(folder, tokenizer, key, getattr(full, key))
        for key in ("boi_token_index", "image_token_index", "eoi_token_index")
    )
    render = prompt_renderer(folder, tokenizer, None, start)

    def process(image: Any) -> ImageInputs:
        return ImageInputs(processor(image, return_tensors="pt")["pixel_values"])

    def preprocess(
        sample_id: str, question: str, images: Any = None, answer: str = "", **_: Any
    ) -> Sample:
        parts = process_images(images, process)
        text = render(question, len(parts), answer)
        ids = tokenize_prompt(tokenizer, text.replace(start, f"\n\n{start}{token}{end}\n\n"))
        counts = [full.mm_tokens_per_image] * len(parts)
        input_ids, is_image = expand_placeholders(sample_id, ids, image_id, counts)
        return Sample(sample_id, input_ids, is_image, join_images(parts))

    return preprocess


FAMILY = ModelFamily(
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    body_prefix=llava.BODY_PREFIX,
    head_prefix=llava.HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=llava.BODY_PREFIX, head=llava.HEAD_PREFIX),
    name_aliases=llava.NAME_ALIASES,
    ignored_tensors=llava.IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="",
    tokens_per_image=tokens_per_image,
    complete_config=make_config_completer(llava.HEAD_PREFIX, llava.NAME_ALIASES, default=True),
)
