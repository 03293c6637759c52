"""Read quantized NeMo 2 checkpoints: split Megatron tensors into Hugging Face linears.

The checkpoint stores unquantized weights. Each linear's quantizer state says how ModelOpt
fake-quantizes them, and the reader does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemo_vlm_ptq.checkpoints.torch_dist_index import Index, read_index, read_object
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_tensor
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint, ReadLinear
from nemo_vlm_ptq.targets.nemo2.quantizer_state import (
    QuantizerState,
    decode,
    input_format_of,
    number_format_of,
)

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan

DECODER_PREFIX = "module.language_model."
# Megatron name -> Hugging Face name, without the layer's prefix.
NON_LAYER_TENSORS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
LINEARS = {
    "self_attention.linear_qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
VISION_PREFIXES = {
    "module.vision_model.": "vision_tower.",
    "module.vision_projection.0.": "multi_modal_projector.linear_1.",
    "module.vision_projection.2.": "multi_modal_projector.linear_2.",
}
AMAX, PRE_QUANT_SCALE = "_amax", "_pre_quant_scale"  # buffers of modelopt's TensorQuantizer

NamedTensors = dict[str, torch.Tensor]


def read_nemo(folder: Path, decoder: Decoder, prefix: str) -> ReadCheckpoint:
    """Read decoder, vision tower and projector of a checkpoint that ModelOpt quantized.

    Args:
        folder: with weights/.
        decoder: shape of the decoder.
        prefix: of Hugging Face names, before `model.` and `lm_head.`.

    Raises:
        VerificationError: a tensor is missing, unexpected or of another shape, or a quantizer is
            not supported.
        UserError: a file is missing or damaged.
    """
    index = read_index(folder / "weights")
    unread = set(index.tensors)

    def read(name: str) -> torch.Tensor:
        if name not in unread:
            raise VerificationError(f"tensor {name} is missing")
        unread.remove(name)
        return read_tensor(index.tensors[name])

    plain: NamedTensors = {}
    linears: dict[str, ReadLinear] = {}
    for name, hf_name in NON_LAYER_TENSORS.items():
        tensor = read(DECODER_PREFIX + name)
        if "layernorm" not in name:
            tensor = _remove_padding(tensor, decoder.vocab, DECODER_PREFIX + name)
        plain[prefix + hf_name] = tensor
    for layer in range(decoder.layers):
        source = f"{DECODER_PREFIX}decoder.layers.{layer}."
        target = f"{prefix}model.layers.{layer}."
        plain |= {target + hf_name: read(source + name) for name, hf_name in NORMS.items()}
        for name, hf_names in LINEARS.items():
            tensors = _linear_tensors(index, source + name, read)
            parts = _split_linear(_quantizers(index, source + name), tensors, name, decoder)
            linears |= {target + hf: part for hf, part in zip(hf_names, parts, strict=True)}
    plain |= _read_vision(sorted(unread), read)
    if unread:
        raise VerificationError(f"unexpected tensor {min(unread)}")
    return ReadCheckpoint(linears=linears, plain=plain)


def _read_vision(names: list[str], read: Callable[[str], torch.Tensor]) -> NamedTensors:
    """Read vision tower and projector by Hugging Face name."""
    return {
        hf_prefix + name.removeprefix(prefix): read(name)
        for name in names
        for prefix, hf_prefix in VISION_PREFIXES.items()
        if name.startswith(prefix)
    }


def _remove_padding(tensor: torch.Tensor, vocab: int, name: str) -> torch.Tensor:
    if tensor[vocab:].any():
        raise VerificationError(f"tensor {name}: padding from row {vocab} must be zero")
    return tensor[:vocab]


def _quantizers(index: Index, linear: str) -> Mapping[str, QuantizerState]:
    """Return the states of a linear's enabled quantizers by quantizer name."""
    name = f"{linear}._extra_state/shard_0_1"
    if name not in index.objects:
        raise VerificationError(f"quantizer state of {linear} is missing")
    state = read_object(index, name)
    quantizers = state.get("modelopt_quantizer_state") if isinstance(state, dict) else None
    if not isinstance(quantizers, dict):
        raise VerificationError(f"quantizer state of {linear} is missing")
    return {name: own for name, own in quantizers.items() if not own["_disabled"]}


def _linear_tensors(index: Index, linear: str, read: Callable[[str], torch.Tensor]) -> NamedTensors:
    """Read a linear's tensors by the suffix of their name; concatenate halves of a gated weight."""
    names = [name for name in index.tensors if name.startswith(f"{linear}.")]
    tensors = {
        name.removeprefix(f"{linear}."): read(name)
        for name in names
        if not name.endswith(".layer_norm_weight")
    }
    if "weight_w" in tensors and "weight_v" in tensors:
        tensors["weight"] = torch.cat([tensors.pop("weight_w"), tensors.pop("weight_v")])
    if "weight" not in tensors:
        raise VerificationError(f"tensor {linear}.weight is missing")
    return tensors


def _split_linear(
    quantizers: Mapping[str, QuantizerState], tensors: NamedTensors, name: str, decoder: Decoder
) -> list[ReadLinear]:
    """Split a Megatron linear into its Hugging Face linears."""
    found = len(tensors["weight"])
    if name.endswith("linear_qkv"):
        rows = _qkv_rows(decoder)
    elif name.endswith("linear_fc1"):
        rows = [torch.arange(decoder.ffn), torch.arange(decoder.ffn, 2 * decoder.ffn)]
    else:
        rows = [torch.arange(found)]
    expected = sum(map(len, rows))
    if expected != found:
        raise VerificationError(f"{name}: weight must have {expected} rows, got {found}")
    return _read_linears(quantizers, tensors, name, rows)


def _qkv_rows(decoder: Decoder) -> list[torch.Tensor]:
    """Return the rows of q, k and v; Megatron orders rows by KV head: queries, key, value."""
    queries, head_dim = decoder.heads // decoder.kv_heads, decoder.head_dim
    rows = torch.arange(decoder.kv_heads * (queries + 2) * head_dim)
    groups = rows.view(decoder.kv_heads, queries + 2, head_dim)
    return [
        groups[:, :queries].flatten(),
        groups[:, queries].flatten(),
        groups[:, queries + 1].flatten(),
    ]


def _read_linears(
    quantizers: Mapping[str, QuantizerState],
    tensors: NamedTensors,
    name: str,
    rows: list[torch.Tensor],
) -> list[ReadLinear]:
    """Read one linear per entry of `rows`, each with those rows of the weight.

    Raises:
        VerificationError: a quantizer is not supported, or a tensor is missing or unexpected.
    """
    used = {"weight"}

    def tensor(key: str) -> torch.Tensor:
        if key not in tensors:
            raise VerificationError(f"tensor {name}.{key} is missing")
        used.add(key)
        return tensors[key].float()

    weight_quantizers = sorted(key for key in quantizers if key.startswith("weight_quantizer"))
    supported = (["weight_quantizer"], ["weight_quantizer.0", "weight_quantizer.1"])
    if weight_quantizers not in supported:
        raise VerificationError(
            f"{name}: weight quantizers must be {supported[0]} or {supported[1]}, "
            f"got {weight_quantizers}"
        )
    state = quantizers[weight_quantizers[0]]
    amax = {key: tensor(f"{key}.{AMAX}") for key in weight_quantizers}
    number_format = number_format_of(state, name)
    pre_quant_scale, input_scale, input_format = None, None, None
    if f"input_quantizer.{PRE_QUANT_SCALE}" in tensors:
        pre_quant_scale = tensor(f"input_quantizer.{PRE_QUANT_SCALE}")
    input_quantizer = quantizers.get("input_quantizer")
    if input_quantizer is not None and input_quantizer["_if_quant"]:
        input_format, max_code = input_format_of(input_quantizer, name)
        if max_code is not None:
            input_scale = tensor(f"input_quantizer.{AMAX}").reshape(()) / max_code
    if unexpected := sorted(set(tensors) - used):
        raise VerificationError(f"unexpected tensor {name}.{unexpected[0]}")
    return [
        ReadLinear(
            stored={"weight": tensors["weight"], "rows": part, **amax},
            decode=partial(decode, state, number_format, list(amax)),
            number_format=number_format,
            fp8_roundings=len(weight_quantizers) - 1,
            pre_quant_scale=pre_quant_scale,
            input_scale=input_scale,
            input_format=input_format,
        )
        for part in rows
    ]


def read(folder: Path, plan: Plan) -> ReadCheckpoint:
    """Read an export of this package."""
    return read_nemo(folder, plan.decoder, plan.family.decoder_prefix)
