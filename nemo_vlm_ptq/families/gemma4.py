"""Gemma 4 of the 31B kind: dense, and layers with full attention have heads of another size.

Parameters have the names of the published checkpoints, which are those of transformers. Images of
any shape are patches, padded to the same number; the tower averages square blocks of them.
"""

from __future__ import annotations

from dataclasses import replace
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
from nemo_vlm_ptq.families.decoder import AttentionShape, SlidingWindow
from nemo_vlm_ptq.families.folder_files import load_tokenizer, token_of_id
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.image_processor import load_pooled_processor
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, decoder_from_sizes, llama_parameter_map
from nemo_vlm_ptq.families.padded_patches import block_counts
from nemo_vlm_ptq.families.placeholders import expand_placeholders, images_of_tokens
from nemo_vlm_ptq.families.scaled_rope import proportional_rope
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.tied_head import make_config_completer

BODY_PREFIX, HEAD_PREFIX = "model.language_model.", "lm_head."
IMAGE_PROCESSORS = ("Gemma4ImageProcessor",)
FULL, SLIDING = "full_attention", "sliding_attention"
PER_LAYER = "text_config.hidden_size_per_layer_input"
TOKEN_IDS = ("boi_token_id", "image_token_id", "eoi_token_id")

full_config = full_config_reader("Gemma4Config")
text_config = text_config_reader(full_config)


class Gemma4Vision(nn.Module):
    """Vision tower, which averages square blocks of patches, and projector."""

    def __init__(self, full: Any) -> None:
        from transformers.models.gemma4.modeling_gemma4 import (
            Gemma4MultimodalEmbedder,
            Gemma4VisionModel,
        )

        super().__init__()
        self._vision, self._hidden = full.vision_config, full.text_config.hidden_size
        self.vision_tower = Gemma4VisionModel(full.vision_config)
        self.embed_vision = Gemma4MultimodalEmbedder(full.vision_config, full.text_config)

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, each encoded without padding."""
        pixels, places = images.pixel_values, images.patch_positions
        assert places is not None
        width = 3 * self._vision.patch_size**2
        if pixels.shape[-1] != width:
            raise ValueError(f"patches must have {width} numbers, got {pixels.shape[-1]}")
        if pixels.is_meta:
            return pixels.new_empty(sum(block_counts(images, self._vision)), self._hidden)
        features = []
        for patches, own in zip(pixels, places.to(pixels.device), strict=True):
            count = int((own[:, 0] >= 0).sum())
            states = self.vision_tower(patches[None, :count], own[None, :count]).last_hidden_state
            features.append(self.embed_vision(states))
        return torch.cat(features)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return parameters and stored buffers by published name."""
        return {f"model.{name}": one for name, one in self.state_dict(keep_vars=True).items()}


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    text, softcap = full.text_config, full.text_config.final_logit_softcapping
    attends, kinds = text.use_bidirectional_attention, set(map(str, text.layer_types))
    require_values(
        FAMILY.name,
        {
            "text_config.model_type": (text.model_type, "gemma4_text"),
            f"{PER_LAYER} (of E2B and E4B)": (text.hidden_size_per_layer_input or 0, 0),
            "text_config.num_kv_shared_layers (of E2B and E4B)": (text.num_kv_shared_layers, 0),
            "text_config.enable_moe_block (of 26B-A4B)": (text.enable_moe_block, False),
            "text_config.hidden_activation": (text.hidden_activation, "gelu_pytorch_tanh"),
            "text_config.attention_bias": (text.attention_bias, False),
            "kinds in layer_types": (sorted({FULL, SLIDING, *kinds}), [FULL, SLIDING]),
        },
    )
    if full.audio_config is not None:
        raise UserError(f"{FAMILY.name}: audio_config is given; only null is supported")
    if attends not in ("vision", None):
        raise UserError(
            f"{FAMILY.name}: text_config.use_bidirectional_attention is {attends!r}; supported: "
            "'vision', None"
        )
    if softcap is not None:
        require_positive(FAMILY.name, {"text_config.final_logit_softcapping": softcap}, float)
    require_positive(FAMILY.name, {"text_config.sliding_window": text.sliding_window}, int)
    _check_vision(full)
    rope, window_rope = _read_rope(text, FULL, "proportional"), _read_rope(text, SLIDING, "default")
    plain = decoder_from_sizes(FAMILY.name, text, rope["rope_theta"], has_sliding_window=True)
    full_attention = _full_attention(text)
    return replace(
        plain,
        sliding_window=SlidingWindow(
            size=text.sliding_window,
            layers=tuple(kind == SLIDING for kind in text.layer_types),
            rope_theta=window_rope["rope_theta"],
        ),
        full_attention=full_attention,
        scaled_rope=proportional_rope(full_attention.head_dim, rope),
        qk_norm=True,
        v_norm=True,
        post_norms=True,
        layer_scalar=True,
        activation="gelu_tanh",
        attention_scale=1.0,
        scaled_embedding=True,
        logit_softcap=softcap,
        bidirectional_images="none" if attends is None else "sliding",
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )


def _full_attention(text: Any) -> AttentionShape:
    """Return the sizes of layers with full attention."""
    key = "num_global_key_value_heads" if text.attention_k_eq_v else "num_key_value_heads"
    kv_heads = getattr(text, key)
    sizes = {f"text_config.{key}": kv_heads, "text_config.global_head_dim": text.global_head_dim}
    require_positive(FAMILY.name, sizes, int)
    if text.num_attention_heads % kv_heads:
        raise UserError(
            f"{FAMILY.name}: num_attention_heads must be a multiple of {key} {kv_heads}, got "
            f"{text.num_attention_heads}"
        )
    return AttentionShape(
        kv_heads=kv_heads, head_dim=text.global_head_dim, v_from_k=bool(text.attention_k_eq_v)
    )


def _read_rope(text: Any, kind: str, rope_type: str) -> dict[str, Any]:
    """Return the settings of the rotary embedding of a kind of layer, with defaults filled in."""
    given = dict((text.rope_parameters or {}).get(kind) or {})
    rope: dict[str, Any] = {"factor": 1.0, "partial_rotary_factor": 1.0, "rope_theta": None} | given
    found = rope.get("rope_type", "default")
    require_values(FAMILY.name, {f"rope type of {kind}": (found, rope_type)})
    numbers = ("rope_theta", "factor", "partial_rotary_factor")
    require_positive(FAMILY.name, {f"{key} of {kind}": rope[key] for key in numbers}, float)
    part, is_plain = rope["partial_rotary_factor"], rope_type == "default"
    most = {f"partial_rotary_factor of {kind}": (part, 1.0 if is_plain else min(part, 1.0))}
    if is_plain:
        most[f"factor of {kind}"] = rope["factor"], 1.0
    require_values(FAMILY.name, most)
    return rope


def _check_vision(full: Any) -> None:
    """Reject vision settings that Gemma4Vision does not support."""
    vision = full.vision_config
    for key in TOKEN_IDS:
        check_token_id(FAMILY.name, key, getattr(full, key))
    if vision is None:
        raise UserError(f"{FAMILY.name}: vision_config is null; a model of text is not supported")
    sizes = [
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "patch_size", "pooling_kernel_size"),
        "position_embedding_size",
    ]
    integers = {f"vision_config.{key}": getattr(vision, key) for key in sizes}
    require_positive(FAMILY.name, integers, int)
    rope = vision.rope_parameters or {}
    require_values(
        FAMILY.name,
        {
            "vision_config.model_type": (vision.model_type, "gemma4_vision"),
            "vision_config.use_clipped_linears": (vision.use_clipped_linears, False),
            "vision_config's rope type": (rope.get("rope_type", "default"), "default"),
        },
    )


def make_vision_module(config: Config) -> Gemma4Vision:
    """Return the vision module, uninitialized."""
    return Gemma4Vision(full_config(config))


def pixels_per_token(config: Config) -> int:
    """Return the pixels of an image that become one token."""
    vision = full_config(config).vision_config
    return int((vision.patch_size * vision.pooling_kernel_size) ** 2)


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not that of the next images, or there are videos or sounds.
    """
    full = full_config(config)
    for kind, token in (("videos", full.video_token_id), ("sounds", full.audio_token_id)):
        if bool((ids == token).any()):
            raise UserError(f"{kind} are not supported")
    counts = [] if images is None else block_counts(images, full.vision_config)
    return images_of_tokens(ids == full.image_token_id, counts, "image_position_ids")


def _process(processor: Any, image: Any, max_pixels: int | None) -> ImageInputs:
    """Return the patches of an image, without padding.

    The published processor enlarges images up to max_soft_tokens; max_pixels lowers that.
    """
    from transformers.models.gemma4.image_processing_pil_gemma4 import (
        get_aspect_ratio_preserving_size,
    )

    own_size: dict[str, bool] = {}
    patch, pooling = processor.patch_size, processor.pooling_kernel_size
    side = patch * pooling
    tokens = processor.max_soft_tokens if max_pixels is None else max_pixels // side**2
    if tokens < processor.max_soft_tokens:
        height, width = side, side
        if tokens > 1:
            height, width = get_aspect_ratio_preserving_size(
                image.height, image.width, patch, tokens * pooling**2, pooling
            )
        image, own_size = image.resize((width, height), processor.resample), {"do_resize": False}
    processed = processor(image, return_tensors="pt", **own_size)
    places = processed["image_position_ids"]
    count = int((places[0, :, 0] >= 0).sum())
    return ImageInputs(processed["pixel_values"][:, :count], patch_positions=places[:, :count])


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of the folder's chat template."""
    tokenizer, full = load_tokenizer(folder), full_config(config)
    processor = load_pooled_processor(folder, IMAGE_PROCESSORS, full.vision_config)
    start, token, end = (
        token_of_id(folder, tokenizer, key, getattr(full, key)) for key in TOKEN_IDS
    )
    render = prompt_renderer(folder, tokenizer, None, token)

    def preprocess(
        sample_id: str,
        question: str,
        images: Any = None,
        answer: str = "",
        *,
        max_pixels: int | None = None,
    ) -> Sample:
        parts = process_images(images, lambda image: _process(processor, image, max_pixels))
        text = render(question, len(parts), answer)
        ids = tokenize_prompt(tokenizer, text.replace(token, f"{start}{token}{end}"))
        counts = [count for one in parts for count in block_counts(one, full.vision_config)]
        input_ids, is_image = expand_placeholders(sample_id, ids, full.image_token_id, counts)
        return Sample(sample_id, input_ids, is_image, join_images(parts))

    return preprocess


FAMILY = ModelFamily(
    name="gemma4",
    architectures=("Gemma4ForConditionalGeneration",),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=(),
    ignored_tensors=(ROTARY_INV_FREQ,),
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="",
    pixels_per_token=pixels_per_token,
    pads_patches=True,
    other_repositories=(("Gemma4UnifiedForConditionalGeneration", "google/gemma-4-31B-it"),),
    complete_config=make_config_completer(HEAD_PREFIX, (), default=True),
)
