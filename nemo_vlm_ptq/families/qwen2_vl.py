"""Qwen2-VL and Qwen2.5-VL: a tower over patches, and a decoder with biases of q, k, v and mRoPE.

Parameters have the names of the published checkpoints; NAME_ALIASES maps those of later versions
of transformers to them. A published config.json has the decoder's keys on its first level.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from nemo_vlm_ptq.families.base import (
    Config,
    ModelFamily,
)
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

BODY_PREFIX, HEAD_PREFIX, TOWER_PREFIX = "model.", "lm_head.", "visual."
NAME_ALIASES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))

full_config = full_config_reader("Qwen2_5_VLConfig", "Qwen2VLConfig")
text_config = text_config_reader(full_config)


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    return replace(qwen_decoder(FAMILY.name, full_config(config), interleaved=False), qkv_bias=True)


def make_vision_module(config: Config) -> QwenVision:
    """Return the vision module, uninitialized."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VisionTransformerPretrainedModel,
    )

    full = full_config(config)
    kind = (
        Qwen2VisionTransformerPretrainedModel
        if full.model_type == "qwen2_vl"
        else Qwen2_5_VisionTransformerPretrainedModel
    )
    return QwenVision(kind(full.vision_config), TOWER_PREFIX, full.text_config.hidden_size)


FAMILY = ModelFamily(
    name="qwen2_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=NAME_ALIASES,
    ignored_tensors=(ROTARY_INV_FREQ,),
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor_factory(full_config),
    find_placeholders=make_placeholder_finder(full_config),
    positions=make_positions(full_config),
    trtllm_vision_type="",
    pixels_per_token=make_pixels_per_token(full_config),
    complete_config=make_config_completer(HEAD_PREFIX, NAME_ALIASES, default=False),
)
