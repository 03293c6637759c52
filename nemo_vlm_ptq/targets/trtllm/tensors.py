"""Names and layouts of the tensors in TensorRT-LLM's rank{r}.safetensors.

Names, shapes and dtypes follow TensorRT-LLM 1.2's loader. Layers are numbered from 0 within a
pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.targets.writing.encode import EncodedLayer, EncodedLinear, KvScales
from nemo_vlm_ptq.targets.writing.packing import concat_rows, pack_columns, pack_rows

# TensorRT-LLM module -> (Megatron linear, its parts in order)
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
    "Phi3ForCausalLM": {  # fc of a rank: its rows of up, then its rows of gate
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
MAX_LAYER_TENSORS = 40


def layer_tensors(
    layer: EncodedLayer, architecture: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors of one layer for one tensor rank, without the layer's name prefix.

    Args:
        layer: the encoded layer, sharded for this rank.
        architecture: TensorRT-LLM's name of the decoder.
        dtype: dtype of everything but codes and float32 scales.
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
    """Return the KV cache scale of one layer, without the layer's name prefix.

    Keys and values share the larger scale. TensorRT-LLM 1.x also accepts separate scales and keeps
    the larger; 0.17 does not.
    """
    larger = torch.maximum(scales.key, scales.value)
    return {"attention.kv_cache_scaling_factor": larger.reshape(1)}


def end_tensors(
    ends: EncodedLayer, architecture: str, stage: tuple[int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return embedding, final norm and head of one rank, those of pipeline stage p of P."""
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
    """Return the tensors of one quantized module of a rank by suffix."""
    first = packed[0]
    out = {"weight": concat_rows([p.codes for p in packed])}
    if first.scale.dim():
        out["weights_scaling_factor"] = concat_rows([p.scale for p in packed])
    else:
        assert all(torch.equal(p.scale, first.scale) for p in packed), "parts share one scale"
        out["weights_scaling_factor"] = first.scale.reshape(1)
    if first.number_format in PACK:
        out["weight"] = PACK[first.number_format](out["weight"])
    if first.pre_quant_scale is not None:
        out["prequant_scaling_factor"] = first.pre_quant_scale.to(dtype)
    if first.input_scale is not None:
        out["activation_scaling_factor"] = first.input_scale.reshape(1)
    if first.scale_2 is not None:
        out["weights_scaling_factor_2"] = first.scale_2.reshape(1)
    return out


def layers_of(decoder: Decoder, p: int, P: int) -> range:
    """Return the global layer indices of pipeline stage p of P."""
    size = decoder.layers // P
    return range(p * size, (p + 1) * size)
