"""Reading a NeMo checkpoint back: Megatron's tensors taken apart, rounded as its quantizers say.

Weights lie there before rounding; each linear's quantizer state says how modelopt rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.torch_dist_index import Index, read_index, read_object
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_tensor
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.reference.checkpoint import Codes, Dequantized, ReadCheckpoint, ReadLinear
from nemo_vlm_ptq.reference.number_formats import (
    E2M1_BLOCK,
    E2M1_TOP,
    FP8_TOP,
    Rounding,
    to_e2m1,
    to_fp8,
)

START = "module.language_model."
ENDS = {
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
BESIDE = {
    "module.vision_model.": "vision_tower.",
    "module.vision_projection.0.": "multi_modal_projector.linear_1.",
    "module.vision_projection.2.": "multi_modal_projector.linear_2.",
}
STEPS = {8: 127.0, 4: 7.0}
FLOATS = {(4, 3): "fp8", (2, 1): "nvfp4"}
AMAX, PREQUANT = "_amax", "_pre_quant_scale"
Given = dict[str, torch.Tensor]


def read_nemo(folder: Path, decoder: Decoder, prefix: str) -> ReadCheckpoint:
    """A checkpoint folder that modelopt quantized: decoder, tower and projector.

    Args:
        folder: with weights/ in it.
        decoder: facts of the decoder.
        prefix: before `model.` and `lm_head.` in the names that are given back.

    Raises:
        ProofError: a tensor is missing, extra, misshapen, or rounded in a way that is not known.
        UserError: files are missing or damaged.
    """
    index = read_index(folder / "weights")
    left = set(index.tensors)

    def take(name: str) -> torch.Tensor:
        if name not in left:
            raise VerificationError(f"tensor {name} is missing")
        left.remove(name)
        return read_tensor(index.tensors[name])

    plain: Given = {}
    linears: dict[str, ReadLinear] = {}
    for stored, name in ENDS.items():
        tensor = take(START + stored)
        if "layernorm" not in stored:
            tensor = _unpadded(tensor, decoder.vocab, START + stored)
        plain[prefix + name] = tensor
    for layer in range(decoder.layers):
        own, published = f"{START}decoder.layers.{layer}.", f"{prefix}model.layers.{layer}."
        plain |= {published + name: take(own + stored) for stored, name in NORMS.items()}
        for stored, names in LINEARS.items():
            given = _given(index, own + stored, take)
            parts = _cut(_state(index, own + stored), given, stored, decoder)
            linears |= {published + name: one for name, one in zip(names, parts, strict=True)}
    plain |= _beside(sorted(left), take)
    if left:
        raise VerificationError(f"tensor {min(left)} is extra")
    return ReadCheckpoint(linears, plain)


def _beside(names: list[str], take: Callable[[str], torch.Tensor]) -> Given:
    """Tower and projector, by published name."""
    return {
        published + stored.removeprefix(start): take(stored)
        for stored in names
        for start, published in BESIDE.items()
        if stored.startswith(start)
    }


def _unpadded(tensor: torch.Tensor, vocab: int, name: str) -> torch.Tensor:
    if tensor[vocab:].any():
        raise VerificationError(f"tensor {name}: rows after {vocab} are not zero")
    return tensor[:vocab]


def _state(index: Index, linear: str) -> Mapping[str, Any]:
    """Quantizer -> its settings, of one linear."""
    name = f"{linear}._extra_state/shard_0_1"
    if name not in index.objects:
        raise VerificationError(f"{linear} has no quantizer state")
    state = read_object(index, name)
    found = state.get("modelopt_quantizer_state") if isinstance(state, dict) else None
    if not isinstance(found, dict):
        raise VerificationError(f"{linear} has no quantizer state")
    return {name: own for name, own in found.items() if not own["_disabled"]}


def _given(index: Index, linear: str, take: Callable[[str], torch.Tensor]) -> Given:
    """The tensors of a linear by their names in it; halves of a gated weight put together."""
    names = [name for name in index.tensors if name.startswith(f"{linear}.")]
    found = {
        name.removeprefix(f"{linear}."): take(name)
        for name in names
        if not name.endswith(".layer_norm_weight")
    }
    if "weight_w" in found and "weight_v" in found:
        found["weight"] = torch.cat([found.pop("weight_w"), found.pop("weight_v")])
    if "weight" not in found:
        raise VerificationError(f"tensor {linear}.weight is missing")
    return found


def _cut(state: Mapping[str, Any], given: Given, stored: str, decoder: Decoder) -> list[ReadLinear]:
    """The Hugging Face linears of a Megatron one."""
    height = len(given["weight"])
    if stored.endswith("linear_qkv"):
        rows = _rows_of_heads(decoder)
    elif stored.endswith("linear_fc1"):
        rows = [torch.arange(decoder.ffn), torch.arange(decoder.ffn, 2 * decoder.ffn)]
    else:
        rows = [torch.arange(height)]
    if sum(map(len, rows)) != height:
        raise VerificationError(f"{stored} has {height} rows, not {sum(map(len, rows))}")
    return _round(state, given, stored, rows)


def _rows_of_heads(decoder: Decoder) -> list[torch.Tensor]:
    """Rows of q, of k and of v: each KV head's queries, its key and its value come together."""
    shared, dim = decoder.heads // decoder.kv_heads, decoder.head_dim
    rows = torch.arange(decoder.kv_heads * (shared + 2) * dim)
    groups = rows.view(decoder.kv_heads, shared + 2, dim)
    return [
        groups[:, :shared].flatten(),
        groups[:, shared].flatten(),
        groups[:, shared + 1].flatten(),
    ]


def _round(
    state: Mapping[str, Any], given: Given, where: str, rows: list[torch.Tensor]
) -> list[ReadLinear]:
    """Parts of a linear, as modelopt computes with it, each of its rows.

    Raises:
        ProofError: quantizers or their tensors are not of a kind that is known.
    """
    used = {"weight"}

    def tensor(name: str) -> torch.Tensor:
        if name not in given:
            raise VerificationError(f"{where}: tensor {name} is missing")
        used.add(name)
        return given[name].float()

    names = sorted(name for name in state if name.startswith("weight_quantizer"))
    if names not in (["weight_quantizer"], ["weight_quantizer.0", "weight_quantizer.1"]):
        raise VerificationError(f"{where}: weights are quantized by {names or 'nothing'}")
    first, amaxes = state[names[0]], {name: tensor(f"{name}.{AMAX}") for name in names}
    number = _number(first, where)
    pre_quant_scale, given_scale, rounding = None, None, None
    if f"input_quantizer.{PREQUANT}" in given:
        pre_quant_scale = tensor(f"input_quantizer.{PREQUANT}")
    own = state.get("input_quantizer")
    if own is not None and own["_if_quant"]:
        rounding, reach = _rounding(own, where)
        if reach is not None:
            given_scale = tensor(f"input_quantizer.{AMAX}").reshape(()) / reach
    if extra := sorted(set(given) - used):
        raise VerificationError(f"{where}: tensor {extra[0]} is extra")
    return [
        ReadLinear(
            codes={"weight": given["weight"], "rows": own_rows, **amaxes},
            decode=partial(_values, first, number, list(amaxes)),
            number=number,
            fp8_roundings=len(names) - 1,
            pre_quant_scale=pre_quant_scale,
            input_scale=given_scale,
            rounding=rounding,
        )
        for own_rows in rows
    ]


def _values(
    first: Mapping[str, Any], number: str, amaxes: Sequence[str], codes: Codes
) -> Dequantized:
    """Some rows of the weight after its quantizer, and after the one of fp8 that may follow."""
    stored, own, amax = codes["weight"], codes["rows"], codes[amaxes[0]]
    weight = stored[own].float()
    if amax.numel() > 1:
        amax = amax.reshape(len(stored), -1)[own]
    step = _step(first, number, amax, weight)
    values = _codes(weight / step, number) * step
    values = torch.where(step > 0, values, torch.zeros_like(values))
    for name in amaxes[1:]:
        scale = codes[name].reshape(()) / FP8_TOP
        values = to_fp8(values / scale) * scale
    return Dequantized(values, step)


def _number(own: Mapping[str, Any], where: str) -> str:
    """Kind of number of a quantizer's codes."""
    bits = own["_num_bits"]
    if bits in FLOATS:
        return FLOATS[bits]
    if bits not in STEPS:
        raise VerificationError(f"{where}: numbers of {bits} bits are not known")
    return f"int{bits}"


def _step(
    own: Mapping[str, Any], number: str, amax: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """What multiplies a code, in a shape that spreads to the weight."""
    if number == "nvfp4":
        top = weight.unflatten(-1, (-1, E2M1_BLOCK)).abs().amax(dim=-1)
        base = amax.reshape(()) / (E2M1_TOP * FP8_TOP)
        return (to_fp8(top / (E2M1_TOP * base)) * base).repeat_interleave(E2M1_BLOCK, 1)
    if number == "fp8":
        return amax.reshape((-1, 1) if amax.numel() > 1 else ()) / FP8_TOP
    sizes, top_code = own["_block_sizes"] or {}, STEPS[own["_num_bits"]]
    if -1 not in sizes:
        return amax.reshape(-1, 1) / top_code
    return amax.reshape(weight.shape[0], -1).repeat_interleave(sizes[-1], dim=1) / top_code


def _codes(scaled: torch.Tensor, number: str) -> torch.Tensor:
    if number == "fp8":
        return to_fp8(scaled)
    if number == "nvfp4":
        return to_e2m1(scaled)
    top = STEPS[int(number.removeprefix("int"))]
    return scaled.round().clamp(-top - 1, top)


def _rounding(own: Mapping[str, Any], where: str) -> tuple[Rounding, float | None]:
    """How inputs are rounded, and the largest value of a static scale in units of it."""
    bits, sizes = own["_num_bits"], own["_block_sizes"] or {}
    if bits == (2, 1):
        return "nvfp4", E2M1_TOP * FP8_TOP
    if bits == (4, 3):
        return ("fp8_token", None) if sizes else ("fp8", FP8_TOP)
    if bits == 8 and not sizes:
        return "int8", STEPS[8]
    raise VerificationError(f"{where}: inputs of {bits} bits are not known")
