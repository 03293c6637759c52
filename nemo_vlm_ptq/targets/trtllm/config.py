"""config.json of a TensorRT-LLM checkpoint (engine backend, 0.18 to 1.2)."""

from __future__ import annotations

from typing import Any

from nemo_vlm_ptq import __version__
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat
from nemo_vlm_ptq.targets.writing.encode import group_settings


def checkpoint_config(
    architecture: str,
    decoder: Decoder,
    fmt: QuantFormat | None,
    group_size: int,
    dtype: str,
    mapping: tuple[int, int],
    kv: KvCacheFormat | None = None,
) -> dict[str, Any]:
    """Return config.json.

    Args:
        architecture: TensorRT-LLM's name of the decoder.
        decoder: sizes of the decoder.
        fmt: the format; None for 16 bit.
        group_size: the recipe's group size.
        dtype: dtype of the weights that are not quantized.
        mapping: (tensor, pipeline) sizes of the serving layout.
        kv: KV cache format, or None.
    """
    tensor, pipeline = mapping
    quantization: dict[str, Any] = {
        "quant_algo": None if fmt is None else fmt.quant_algo,
        "kv_cache_quant_algo": None if kv is None else kv.quant_algo,
    }
    if fmt is not None:
        quantization |= {"exclude_modules": ["lm_head"], **group_settings(fmt, group_size)}
    return {
        "producer": {"name": "nemo_vlm_ptq", "version": __version__},
        "architecture": architecture,
        "dtype": dtype,
        "logits_dtype": "float16" if dtype == "bfloat16" else dtype,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.ffn,
        "head_size": decoder.head_dim,
        "vocab_size": decoder.vocab,
        "norm_epsilon": decoder.norm_eps,
        "hidden_act": "swiglu" if architecture == "Phi3ForCausalLM" else "silu",
        "max_position_embeddings": decoder.max_positions,
        "rotary_base": decoder.rope_theta,
        "rotary_scaling": None,
        **_position_embedding(decoder),
        **({"rotary_pct": 1.0} if architecture == "Phi3ForCausalLM" else {}),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tensor * pipeline, "tp_size": tensor, "pp_size": pipeline},
        "quantization": quantization,
    }


def _position_embedding(decoder: Decoder) -> dict[str, Any]:
    rope = decoder.long_rope
    if rope is None:
        return {"position_embedding_type": "rope_gpt_neox"}
    return {
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": rope.original_max_positions,
        "longrope_scaling_short_factors": list(rope.short_factors),
        "longrope_scaling_long_factors": list(rope.long_factors),
    }
