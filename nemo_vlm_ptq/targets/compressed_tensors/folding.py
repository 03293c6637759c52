"""Scales in front of linears put into what comes before them, for readers that know no such scale.

q, k and v read one norm, gate and up another: its weight takes their scale. Attention is linear in
v, and silu(gate) * up in up: rows of v take the scale of o_proj, rows of up that of down, on the
scales of the rows, so that no code changes. A norm's weight is rounded once more to its dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.numerics import weight_amax
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes
from nemo_vlm_ptq.targets.writing.encode import (
    EncodedEntry,
    EncodedLayer,
    EncodedLinear,
    KvScales,
    ReadTensors,
    encode_entry,
)

NORMS = {"linear_qkv": "input_layernorm", "linear_fc1": "pre_mlp_layernorm"}  # linear -> its input
ATTENTION_OUTPUT = "linear_proj"
# Linear -> the one whose last part (v, up) its input is linear in.
ROWS = {ATTENTION_OUTPUT: "linear_qkv", "linear_fc2": "linear_fc1"}


def fold_layer(
    layer: EncodedLayer,
    scales: Mapping[str, Any],
    imported: ReadTensors,
    fmt: QuantFormat,
    decoder: Decoder,
) -> EncodedLayer:
    """The layer without scales in front of its linears.

    Args:
        layer: as streamed.
        scales: linear -> LinearScales of this layer.
        imported: reads whole Megatron tensors of the 16 bit model by name.
        fmt: the format.
        decoder: facts.
    """
    if not fmt.pre_quant_scale:
        return layer
    sizes, folded = decoder.sizes(1), dict(layer)
    folded[ATTENTION_OUTPUT] = _tie(layer[ATTENTION_OUTPUT], scales, imported, fmt, decoder)
    before = {linear: _prequant(folded[linear]) for linear in (*NORMS, *ROWS)}
    for linear, norm in NORMS.items():
        (weight,) = layer[norm].parts
        assert isinstance(weight, torch.Tensor)
        own = (weight.float() * before[linear]).to(weight.dtype)
        folded[norm] = replace(layer[norm], parts=(own,))
    before[ATTENTION_OUTPUT] = _one_a_kv_channel(before[ATTENTION_OUTPUT], sizes)
    for linear, source in ROWS.items():
        *others, last = folded[source].parts
        assert isinstance(last, EncodedLinear)
        scale_GO = last.scale.T * before[linear]  # or [O]
        parts = (*others, replace(last, scale=scale_GO.T.contiguous()))
        folded[source] = replace(folded[source], parts=parts)
    for linear in before:
        parts = tuple(replace(part, pre_quant_scale=None) for part in folded[linear].parts)  # type: ignore[type-var]
        folded[linear] = replace(folded[linear], parts=parts)
    return folded


def fold_kv(kv: KvScales, scales: Mapping[str, Any], sizes: HeadSizes) -> KvScales:
    """Scales of a cache whose values have grown by the scale of o_proj.

    The largest |value| is known of a layer, not of its channels; it grows at most by the largest
    scale.
    """
    pre_quant_scale = scales[ATTENTION_OUTPUT].pre_quant_scale
    if pre_quant_scale is None:
        return kv
    return replace(kv, value=kv.value * min_over_queries(pre_quant_scale, sizes).max())


def min_over_queries(pre_quant_scale_K: torch.Tensor, sizes: HeadSizes) -> torch.Tensor:
    """o_proj's scale, the least one of the query heads that share a KV head, for all of them.

    The least keeps the input below the static scale that was solved for it.
    """
    heads = pre_quant_scale_K.reshape(sizes.kv_heads, sizes.queries_per_kv_head, sizes.head_dim)
    return heads.amin(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def _one_a_kv_channel(pre_quant_scale_K: torch.Tensor, sizes: HeadSizes) -> torch.Tensor:
    """A tied scale of o_proj as the rows of v take it, [KV heads * head_dim]."""
    return pre_quant_scale_K.reshape(sizes.kv_heads, sizes.queries_per_kv_head, sizes.head_dim)[
        :, 0
    ].reshape(-1)


def _prequant(piece: EncodedEntry) -> torch.Tensor:
    first = piece.parts[0]
    assert isinstance(first, EncodedLinear) and first.pre_quant_scale is not None
    return first.pre_quant_scale


def _tie(
    piece: EncodedEntry,
    scales: Mapping[str, Any],
    imported: ReadTensors,
    fmt: QuantFormat,
    decoder: Decoder,
) -> EncodedEntry:
    """o_proj with one scale for the query heads that share a KV head, encoded anew if it had more.

    AWQ's scales are tied when they are solved, SmoothQuant's are not.
    """
    own = scales[ATTENTION_OUTPUT]
    tied = min_over_queries(own.pre_quant_scale, decoder.sizes(1))
    if torch.equal(tied, own.pre_quant_scale):
        return piece
    (weight_OK,) = imported([piece.row.megatron_name]).values()
    weight_OK = weight_OK.float() / tied
    amax = weight_amax(weight_OK, fmt.granularity, weight_OK.shape[1])
    changed = replace(own, pre_quant_scale=tied, weight_amax=amax)
    return replace(piece, parts=encode_entry(piece.row, weight_OK, changed, fmt, decoder))
