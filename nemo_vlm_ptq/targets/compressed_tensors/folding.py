"""Fold pre_quant_scale into preceding tensors, for checkpoints that cannot store it.

q, k and v read the output of one norm, gate and up that of another, so the norm's weight absorbs
their scale. The attention output is linear in v, and act(gate) * up is linear in up, so the
output channels of v absorb the scale of o_proj, and those of up the scale of down_proj. That
multiplies the weight scales and changes no code. A norm's weight is rounded once more to its dtype.
Where values have a norm, the scale of o_proj is solved as 1, and v absorbs nothing.

Legend: O output features, K input features, G groups of K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nemo_vlm_ptq.families.decoder import Decoder
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

INPUT_NORMS = {"linear_qkv": "input_layernorm", "linear_fc1": "pre_mlp_layernorm"}
ATTENTION_OUTPUT, VALUE_BIAS = "linear_proj", "linear_qkv.bias"
# Linear -> the linear whose last part (v, up) its input is linear in.
PRECEDING_LINEARS = {ATTENTION_OUTPUT: "linear_qkv", "linear_fc2": "linear_fc1"}


def fold_layer(
    layer: EncodedLayer,
    scales: Mapping[str, Any],
    imported: ReadTensors,
    fmt: QuantFormat,
    decoder: Decoder,
) -> EncodedLayer:
    """Return the layer with its pre_quant_scale folded into norms and weight scales.

    Args:
        layer: encoded layer, unsharded.
        scales: linear -> LinearScales of this layer.
        imported: reads unsharded Megatron tensors of the 16 bit model by name.
        fmt: quantization format.
        decoder: shape of the decoder.
    """
    if not fmt.uses_pre_quant_scale:
        return layer
    folded, absorbs = dict(layer), decoder.has_linear_values and ATTENTION_OUTPUT in layer
    if absorbs:
        folded[ATTENTION_OUTPUT] = _share_attention_scale(
            layer[ATTENTION_OUTPUT], scales, imported, fmt, decoder
        )
    linears = [name for name in (*INPUT_NORMS, *PRECEDING_LINEARS) if name in layer]
    factors = {linear: _pre_quant_scale(folded[linear]) for linear in linears}
    for linear in filter(factors.__contains__, INPUT_NORMS):
        norm = INPUT_NORMS[linear]
        (weight,) = layer[norm].parts
        assert isinstance(weight, torch.Tensor)
        offset = 1.0 if decoder.zero_centered_norms else 0.0
        scaled = (weight.float() + offset) * factors[linear].to(weight.device) - offset
        folded[norm] = replace(layer[norm], parts=(scaled.to(weight.dtype),))
    if absorbs:
        sizes = decoder.sizes(1, layer[ATTENTION_OUTPUT].entry.first_layer)
        factors[ATTENTION_OUTPUT] = _per_kv_channel(factors[ATTENTION_OUTPUT], sizes)
    elif ATTENTION_OUTPUT in factors:
        assert bool((factors[ATTENTION_OUTPUT] == 1).all()), "no linear can absorb a scale"
    for linear in filter(factors.__contains__, PRECEDING_LINEARS):
        if linear == ATTENTION_OUTPUT and not absorbs:
            continue
        preceding = PRECEDING_LINEARS[linear]
        *others, last = folded[preceding].parts
        assert isinstance(last, EncodedLinear)
        scale_GO = last.scale.T * factors[linear]  # per output channel: [O]
        parts = (*others, replace(last, scale=scale_GO.T.contiguous()))
        folded[preceding] = replace(folded[preceding], parts=parts)
    bias = folded.get(VALUE_BIAS)
    if bias is not None:  # of v, which is added to its scaled channels
        *others, last = bias.parts
        assert isinstance(last, torch.Tensor)
        scaled = (last.float() * factors[ATTENTION_OUTPUT].to(last.device)).to(last.dtype)
        folded[VALUE_BIAS] = replace(bias, parts=(*others, scaled))
    for linear in factors:
        parts = tuple(replace(part, pre_quant_scale=None) for part in folded[linear].parts)  # type: ignore[type-var]
        folded[linear] = replace(folded[linear], parts=parts)
    return folded


def fold_kv(kv: KvScales, scales: Mapping[str, Any], sizes: HeadSizes) -> KvScales:
    """Scale up the value scale of a KV cache whose values absorbed the scale of o_proj.

    The largest |value| is known per layer, not per channel. It grows at most by the largest factor.
    """
    pre_quant_scale = scales[ATTENTION_OUTPUT].pre_quant_scale
    if pre_quant_scale is None:
        return kv
    return replace(kv, value=kv.value * min_over_queries(pre_quant_scale, sizes).max())


def min_over_queries(pre_quant_scale_K: torch.Tensor, sizes: HeadSizes) -> torch.Tensor:
    """Return the minimum of o_proj's scale over query heads that share a KV head, expanded to [K].

    The minimum keeps the input within the static scale that was solved for it.
    """
    heads = pre_quant_scale_K.reshape(sizes.kv_heads, sizes.queries_per_kv_head, sizes.head_dim)
    return heads.amin(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def _per_kv_channel(pre_quant_scale_K: torch.Tensor, sizes: HeadSizes) -> torch.Tensor:
    """Reduce a shared scale of o_proj [K] to the output channels of v [kv_heads * head_dim]."""
    heads = pre_quant_scale_K.reshape(sizes.kv_heads, sizes.queries_per_kv_head, sizes.head_dim)
    return heads[:, 0].reshape(-1)


def _pre_quant_scale(encoded: EncodedEntry) -> torch.Tensor:
    first = encoded.parts[0]
    assert isinstance(first, EncodedLinear) and first.pre_quant_scale is not None
    return first.pre_quant_scale


def _share_attention_scale(
    encoded: EncodedEntry,
    scales: Mapping[str, Any],
    imported: ReadTensors,
    fmt: QuantFormat,
    decoder: Decoder,
) -> EncodedEntry:
    """Return o_proj with one scale per KV head, encoded again if its query heads differed.

    AWQ solves shared scales; SmoothQuant does not.
    """
    solved = scales[ATTENTION_OUTPUT]
    sizes = decoder.sizes(1, encoded.entry.first_layer)
    shared = min_over_queries(solved.pre_quant_scale, sizes)
    if torch.equal(shared, solved.pre_quant_scale):
        return encoded
    (weight_OK,) = imported([encoded.entry.megatron_name]).values()
    weight_OK = weight_OK.cpu().float() / shared
    amax = weight_amax(weight_OK, fmt.granularity, weight_OK.shape[1])
    changed = replace(solved, pre_quant_scale=shared, weight_amax=amax)
    parts = encode_entry(encoded.entry, weight_OK, changed, fmt, decoder)
    return replace(encoded, parts=parts)
