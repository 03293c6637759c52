"""Qwen2 and Qwen3 as decoders of other models: biases, or norms of heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Config, Decoder
from nemo_vlm_ptq.families.config_checks import require_values
from nemo_vlm_ptq.families.llama import decoder_from_sizes

MODEL_TYPES = ("qwen2", "qwen3")
# "dynamic" rescales sequences beyond max_position_embeddings only, which are rejected
ROPE_TYPES = ("default", "dynamic")


def qwen_text_decoder(family: str, config: Config, text: Any) -> Decoder:
    """Return the decoder of a Qwen2Config or Qwen3Config.

    Args:
        family: name of the family, for messages.
        config: the parsed config.json.
        text: transformers' config of the decoder.

    Raises:
        UserError: the config has a value that the parameter map does not support.
    """
    rope = dict(text.to_dict().get("rope_parameters") or {})
    supported = {
        "text_config.model_type": (text.model_type, MODEL_TYPES),
        "rope type": (rope.get("rope_type", "default"), ROPE_TYPES),
    }
    for key, (value, values) in supported.items():
        if value not in values:
            raise UserError(f"{family}: {key} is {value!r}; supported: {', '.join(values)}")
    require_values(
        family,
        {
            "text_config.hidden_act": (text.hidden_act, "silu"),
            "text_config.attention_bias": (getattr(text, "attention_bias", False), False),
            "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        },
    )
    plain = decoder_from_sizes(family, text, rope.get("rope_theta", 10000.0))
    is_tied = bool(config.get("tie_word_embeddings") or text.tie_word_embeddings)
    is_qwen3 = text.model_type == "qwen3"
    return replace(plain, qkv_bias=not is_qwen3, qk_norm=is_qwen3, tied_head=is_tied)
