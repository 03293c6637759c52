"""Qwen3-VL, dense: a tower over patches, deepstack, and a decoder with normalized heads and mRoPE.

Parameters have the names of the published checkpoints, which are those of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Config, ModelFamily
from nemo_vlm_ptq.families.config_checks import require_values
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, llama_parameter_map
from nemo_vlm_ptq.families.qwen import (
    QwenVision,
    make_pixels_per_token,
    make_placeholder_finder,
    make_positions,
    make_preprocessor_factory,
    qwen_decoder,
)
from nemo_vlm_ptq.families.tied_head import make_config_completer

BODY_PREFIX, HEAD_PREFIX, TOWER_PREFIX = "model.language_model.", "lm_head.", "model.visual."

full_config = full_config_reader("Qwen3VLConfig")
text_config = text_config_reader(full_config)


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    bias = {"text_config.attention_bias": (full.text_config.attention_bias, False)}
    require_values(FAMILY.name, bias)
    plain = qwen_decoder(FAMILY.name, full, interleaved=True)
    layers = full.vision_config.deepstack_visual_indexes
    if len(layers) > plain.layers:
        raise UserError(
            f"{FAMILY.name}: deepstack_visual_indexes has {len(layers)} layers, and the decoder "
            f"{plain.layers}"
        )
    return replace(plain, qk_norm=True, deepstack_layers=len(layers))


def make_vision_module(config: Config) -> QwenVision:
    """Return the vision module, uninitialized."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    full = full_config(config)
    width = full.text_config.hidden_size * (1 + len(full.vision_config.deepstack_visual_indexes))
    return QwenVision(Qwen3VLVisionModel(full.vision_config), TOWER_PREFIX, width)


FAMILY = ModelFamily(
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=(),
    ignored_tensors=(ROTARY_INV_FREQ,),
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor_factory(full_config),
    find_placeholders=make_placeholder_finder(full_config),
    positions=make_positions(full_config),
    trtllm_vision_type="",
    pixels_per_token=make_pixels_per_token(full_config),
    complete_config=make_config_completer(HEAD_PREFIX, (), default=False),
)
