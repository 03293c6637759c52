"""Check a TensorRT-LLM checkpoint against its loader's contract and against the source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.targets.checking import (
    Check,
    ExpectedQuantization,
    differences,
    quantization_differences,
)
from nemo_vlm_ptq.targets.trtllm.contract import check_contract

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan


def check(folder: Path, plan: Plan, expected: ExpectedQuantization) -> Iterator[Check]:
    """Yield the checks of one checkpoint folder."""
    findings = check_contract(folder / "llm")
    yield Check(name="contract", findings=findings, about="names, shapes, dtypes, config")
    findings = check_config(folder / "llm", plan.decoder, expected, plan.dtype)
    yield Check(
        name="configs", findings=findings, about="configs describe the source in this format"
    )


def check_config(
    folder: Path, decoder: Decoder, expected: ExpectedQuantization, dtype: str
) -> list[str]:
    """Return findings of config.json.

    Args:
        folder: holds config.json.
        decoder: sizes of the source's decoder.
        expected: the quantization.
        dtype: dtype of the weights that are not quantized.
    """
    config = json.loads((folder / "config.json").read_text())
    values = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.ffn,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_size": decoder.head_dim,
        "vocab_size": decoder.vocab,
        "norm_epsilon": decoder.norm_eps,
        "rotary_base": decoder.rope_theta,
        "max_position_embeddings": decoder.max_positions,
        "hidden_act": "silu",
        "position_embedding_type": "rope_gpt_neox",
        "dtype": dtype,
    }
    rope = decoder.long_rope
    if config["architecture"] == "Phi3ForCausalLM":
        values["hidden_act"] = "swiglu"
    if rope is not None:
        values |= {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": rope.original_max_positions,
            "longrope_scaling_short_factors": list(rope.short_factors),
            "longrope_scaling_long_factors": list(rope.long_factors),
        }
    findings = differences("config.json", config, values)
    return findings + quantization_differences("config.json", config["quantization"], expected)
