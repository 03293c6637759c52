"""Qwen3.5, 3.6 and 3.8, dense: three of four layers are a Gated DeltaNet, which stays in 16 bit.

Parameters have the names of the published checkpoints, which are those of transformers. Layers that
predict further tokens (mtp.) are handed on to exports as they are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from nemo_vlm_ptq.families.base import Config, ModelFamily
from nemo_vlm_ptq.families.config_checks import require_positive, require_values
from nemo_vlm_ptq.families.decoder import Decoder, DeltaNet
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
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor

BODY_PREFIX, HEAD_PREFIX, TOWER_PREFIX = "model.language_model.", "lm_head.", "model.visual."
FULL, LINEAR = "full_attention", "linear_attention"
MTP = IgnoredTensor(
    pattern=r"mtp\..*", reason="layers that predict further tokens", passthrough=True
)

full_config = full_config_reader("Qwen3_5Config")
text_config = text_config_reader(full_config)


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
            "text_config.attention_bias": (text.attention_bias, False),
            "text_config.attn_output_gate": (getattr(text, "attn_output_gate", True), True),
            "kinds in layer_types": (
                sorted({FULL, LINEAR, *map(str, text.layer_types)}),
                [FULL, LINEAR],
            ),
            "deepstack_visual_indexes": (
                getattr(full.vision_config, "deepstack_visual_indexes", None) or [],
                [],
            ),
        },
    )
    return replace(
        qwen_decoder(FAMILY.name, full, interleaved=True, is_partial=True),
        qk_norm=True,
        zero_centered_norms=True,
        output_gate=True,
        delta_net=_read_delta_net(text),
    )


def _read_delta_net(text: Any) -> DeltaNet:
    """Return the sizes of the DeltaNet, and which layers have it."""
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    sizes = [f"linear_{name}" for name in (*names, "conv_kernel_dim")]
    require_positive(FAMILY.name, {key: getattr(text, key) for key in sizes}, int)
    keys, values = text.linear_num_key_heads, text.linear_num_value_heads
    require_values(
        FAMILY.name, {"linear_num_value_heads % linear_num_key_heads": (values % keys, 0)}
    )
    return DeltaNet(
        layers=tuple(kind == LINEAR for kind in text.layer_types),
        key_heads=keys,
        value_heads=values,
        key_dim=text.linear_key_head_dim,
        value_dim=text.linear_value_head_dim,
        kernel=text.linear_conv_kernel_dim,
    )


def make_vision_module(config: Config) -> QwenVision:
    """Return the vision module, uninitialized."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

    full = full_config(config)
    tower = Qwen3_5VisionModel(full.vision_config)
    return QwenVision(tower, TOWER_PREFIX, full.text_config.hidden_size)


FAMILY = ModelFamily(
    name="qwen3_5",
    architectures=("Qwen3_5ForConditionalGeneration",),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=(),
    ignored_tensors=(ROTARY_INV_FREQ, MTP),
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
