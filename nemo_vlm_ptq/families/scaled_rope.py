"""Llama-like decoders whose rotary frequencies are scaled, and whose head may be tied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Config, Decoder
from nemo_vlm_ptq.families.config_checks import require_positive, require_values
from nemo_vlm_ptq.families.decoder import ScaledRope
from nemo_vlm_ptq.families.llama import check_plain_layers, decoder_from_sizes
from nemo_vlm_ptq.input_files import shorten

NUMBERS = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
LENGTH = "original_max_position_embeddings"


def scaled_rope_decoder(
    family: str, config: Config, text: Any, rope_types: Sequence[str]
) -> Decoder:
    """Return the decoder of transformers' LlamaConfig, MistralConfig or Ministral3Config.

    Args:
        family: name of the family, for messages.
        config: the parsed config.json.
        text: transformers' config of the decoder.
        rope_types: those that the decoder can have, of "default" and NUMBERS.

    Raises:
        UserError: the config has a value that the parameter map does not support.
    """
    rope = dict(text.to_dict().get("rope_parameters") or {})
    rope_type = rope.get("rope_type", "default")
    if rope_type not in rope_types:
        raise UserError(f"{family}: rope type is {rope_type!r}; supported: {', '.join(rope_types)}")
    check_plain_layers(family, text, "text_config")
    partial = rope.get("partial_rotary_factor", 1.0)
    require_values(family, {"partial_rotary_factor": (partial, 1.0)})
    plain = decoder_from_sizes(family, text, rope.get("rope_theta", 10000.0))
    is_tied = bool(config.get("tie_word_embeddings") or text.tie_word_embeddings)
    scaled = None if rope_type == "default" else _read(family, text, rope_type, rope)
    return replace(plain, scaled_rope=scaled, tied_head=is_tied)


def _read(family: str, text: Any, rope_type: str, rope: dict[str, Any]) -> ScaledRope:
    """Return the frequencies as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    numbers = {f"rope_parameters.{key}": rope.get(key) for key in NUMBERS[rope_type]}
    require_positive(family, numbers, float)
    require_positive(family, {f"rope_parameters.{LENGTH}": rope.get(LENGTH)}, int)
    if rope_type == "llama3" and not rope["high_freq_factor"] > rope["low_freq_factor"]:
        raise UserError(
            f"{family}: rope_parameters.high_freq_factor must be above low_freq_factor "
            f"{rope['low_freq_factor']}, got {rope['high_freq_factor']}"
        )
    given = shorten(repr(rope))
    try:
        with torch.device("cpu"):
            found, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](text, torch.device("cpu"))
        frequencies = tuple(found.tolist())
        factor = float(attention_factor)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{family}: rope_parameters {given} cannot be used: {error}") from None
    if not all(math.isfinite(number) and number > 0 for number in (*frequencies, factor)):
        raise UserError(
            f"{family}: rope_parameters {given} give frequencies or a scale that are no positive "
            "numbers"
        )
    return ScaledRope(frequencies=frequencies, attention_factor=factor)


def proportional_rope(head_dim: int, rope: Mapping[str, Any]) -> ScaledRope:
    """Return frequencies of which only the first turn, the others are 0.

    Args:
        head_dim: numbers of a head.
        rope: rope_theta, factor, and partial_rotary_factor: the share of those that turn.
    """
    turning = int(rope["partial_rotary_factor"] * head_dim // 2)
    exponents = torch.arange(0, 2 * turning, 2).float() / head_dim
    frequencies = (1.0 / rope["rope_theta"] ** exponents) / rope["factor"]
    still = [0.0] * (head_dim // 2 - turning)
    return ScaledRope(frequencies=(*frequencies.tolist(), *still), attention_factor=1.0)
