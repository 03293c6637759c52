"""TensorRT-LLM checkpoints (engine backend, 0.18 to 1.2): config.json and rank{r}.safetensors.

A rank's file is written by whoever deals with it, from its layers of the stream. Names, shapes
and dtypes follow TensorRT-LLM 1.2's own loader; r = pipeline index * tensor size + tensor index,
and layers are counted from 0 within a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat
from nemo_vlm_ptq.targets.writing.encode import (
    EncodedLayer,
    EncodedLinear,
    KvScales,
    group_settings,
)
from nemo_vlm_ptq.targets.writing.packing import concat_rows, pack_columns, pack_rows

# TensorRT-LLM module -> (Megatron's linear, its parts in order)
ATTENTION = {
    "attention.qkv": ("linear_qkv", (0, 1, 2)),
    "attention.dense": ("linear_proj", (0,)),
}
LINEARS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "LlamaForCausalLM": {
        **ATTENTION,
        "mlp.fc": ("linear_fc1", (0,)),
        "mlp.gate": ("linear_fc1", (1,)),
        "mlp.proj": ("linear_fc2", (0,)),
    },
    "Phi3ForCausalLM": {  # fc of a rank is its rows of up, then its rows of gate
        **ATTENTION,
        "mlp.fc": ("linear_fc1", (1, 0)),
        "mlp.proj": ("linear_fc2", (0,)),
    },
}
PACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int4": pack_rows,
    "nvfp4": pack_columns,
}
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "pre_mlp_layernorm"}
ENDS = {
    "transformer.vocab_embedding.weight": "word_embeddings",
    "transformer.ln_f.weight": "final_layernorm",
    "lm_head.weight": "output_layer",
}
MAX_LAYER_TENSORS = 40  # tensors of a layer


def config(
    architecture: str,
    decoder: Decoder,
    fmt: QuantFormat | None,
    group: int,
    dtype: str,
    mapping: tuple[int, int],
    kv: KvCacheFormat | None = None,
) -> dict[str, Any]:
    """config.json for `tensor x pipeline` inference ranks; fmt None is 16 bit."""
    tensor, pipeline = mapping
    quantization: dict[str, Any] = {
        "quant_algo": None if fmt is None else fmt.quant_algo,
        "kv_cache_quant_algo": None if kv is None else kv.quant_algo,
    }
    if fmt is not None:
        quantization |= {"exclude_modules": ["lm_head"], **group_settings(fmt, group)}
    return {
        "producer": {"name": "nemo_vlm_ptq"},
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
        **_positions(decoder),
        **({"rotary_pct": 1.0} if architecture == "Phi3ForCausalLM" else {}),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tensor * pipeline, "tp_size": tensor, "pp_size": pipeline},
        "quantization": quantization,
    }


def _positions(decoder: Decoder) -> dict[str, Any]:
    rope = decoder.long_rope
    if rope is None:
        return {"position_embedding_type": "rope_gpt_neox"}
    return {
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": rope.original,
        "longrope_scaling_short_factors": list(rope.short),
        "longrope_scaling_long_factors": list(rope.long),
    }


def layer_tensors(
    layer: EncodedLayer, architecture: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of one layer for one tensor rank, names without the layer's own prefix.

    Args:
        layer: from the stream, as this rank holds it.
        architecture: TensorRT-LLM's name of the decoder.
        dtype: of everything that is not codes or float32 scales.
    """
    out: dict[str, torch.Tensor] = {}
    for name, source in NORMS.items():
        out[f"{name}.weight"] = layer[source].parts[0].to(dtype)  # type: ignore[union-attr]
    for module, (linear, order) in LINEARS[architecture].items():
        parts: list[Any] = [layer[linear].parts[index] for index in order]
        if isinstance(parts[0], EncodedLinear):
            tensors = _quantized(parts, dtype)
        else:
            tensors = {"weight": concat_rows(parts).to(dtype)}
        out.update({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()})
    return out


def kv_tensors(scales: KvScales) -> dict[str, torch.Tensor]:
    """The scale that keys and values of one layer share, without the layer's prefix.

    1.x would take one for keys and one for values too, and keep the larger; 0.17 would not.
    """
    larger = torch.maximum(scales.key, scales.value)
    return {"attention.kv_cache_scaling_factor": larger.reshape(1)}


def end_tensors(
    ends: EncodedLayer, architecture: str, stage: tuple[int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Embedding, last norm and head of one rank, of those that pipeline stage p of P has."""
    p, P = stage
    assert P == 1 or architecture == "LlamaForCausalLM", architecture
    out = {}
    for name, source in ENDS.items():
        if p == (0 if source == "word_embeddings" else P - 1):
            (tensor,) = ends[source].parts
            assert isinstance(tensor, torch.Tensor)
            out[name] = tensor.to(dtype)
    return out


def _quantized(packed: list[EncodedLinear], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one quantized module of a rank."""
    first = packed[0]
    out = {"weight": concat_rows([p.codes for p in packed])}
    if first.scale.dim():
        out["weights_scaling_factor"] = concat_rows([p.scale for p in packed])
    else:
        assert all(torch.equal(p.scale, first.scale) for p in packed), "parts share one scale"
        out["weights_scaling_factor"] = first.scale.reshape(1)
    if first.kind in PACK:
        out["weight"] = PACK[first.kind](out["weight"])
    if first.pre_quant_scale is not None:
        out["prequant_scaling_factor"] = first.pre_quant_scale.to(dtype)
    if first.input_scale is not None:
        out["activation_scaling_factor"] = first.input_scale.reshape(1)
    if first.scale_2 is not None:
        out["weights_scaling_factor_2"] = first.scale_2.reshape(1)
    return out


def layers_of(decoder: Decoder, p: int, P: int) -> range:
    """Global layer indices of pipeline stage p of P."""
    size = decoder.layers // P
    return range(p * size, (p + 1) * size)
