"""The stream every export target is written from: rows, codes and scales.

A layer is taken apart by its rows, cut to what a rank that serves holds, and encoded; targets put
the parts together in their own way, under their own names. Whatever ranks wrote the checkpoint,
its tensors are whole here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import KvCacheFormat, NumberFormat, QuantFormat
from nemo_vlm_ptq.numerics import encode, nvfp4_scales, scale_from_amax
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import shard_input, unshard_tensor
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.writing.on_device import on_device

CPU = torch.device("cpu")
ReadTensors = Callable[[Iterable[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class EncodedLinear:
    """One part of a quantized linear: q, k, v, gate or up by itself, or a whole other linear.

    (nf4: a whole Hugging Face tensor, if parts lie in one.) codes [O,K], none packed yet:
    float8_e4m3fn, int8 (int8, int4) or uint8 nibbles (nvfp4, nf4); scale [], [O] or [O,G], float32
    or, for nvfp4, float8_e4m3fn; scale_2 [] (W4A8, nvfp4), input_scale [], prequant [K],
    low_rank_a [r,K], low_rank_b [O,r]; double: nf4's absmaxes as they are stored. None where the
    format has none.
    """

    kind: NumberFormat
    codes: torch.Tensor
    scale: torch.Tensor
    scale_2: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    low_rank_a: torch.Tensor | None = None
    low_rank_b: torch.Tensor | None = None
    nested_absmax: nf4.NestedAbsmax | None = None


@dataclass(frozen=True)
class KvScales:
    """Scales [] float32 of a layer's cached keys and values."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class EncodedEntry:
    """One row of a layer (or of the ends): its parts in the row's order, packed or plain."""

    row: ParameterEntry
    parts: tuple[EncodedLinear, ...] | tuple[torch.Tensor, ...]


EncodedLayer = dict[
    str, EncodedEntry
]  # by Megatron's name without its prefix: linear_qkv, input_layernorm, ...


def kv_scales(key_amax: torch.Tensor, value_amax: torch.Tensor, kv: KvCacheFormat) -> KvScales:
    """Scales from the largest |key| and |value| [] of a layer.

    nvfp4's is amax / 448 like fp8's, as modelopt 0.47 exports and TensorRT-LLM 1.2 reads it: blocks
    of 16 get their e4m3 scales in units of it.
    """
    kind: NumberFormat = "fp8" if kv.kind == "nvfp4" else kv.kind
    return KvScales(scale_from_amax(key_amax, kind), scale_from_amax(value_amax, kind))


def group_settings(fmt: QuantFormat, group: int) -> dict[str, Any]:
    """What the quantization block of a config file says about groups of inputs."""
    if not fmt.grouped:
        return {}
    size: dict[str, Any] = {"group_size": fmt.group(group)}
    if fmt.pre_quant_scale or fmt.weight == "int4":
        size |= {"has_zero_point": False, "pre_quant_scale": fmt.pre_quant_scale}
    return size


def encode_entry(
    row: ParameterEntry,
    weight: Any,
    scales: Any,
    fmt: QuantFormat,
    decoder: Decoder,
    device: torch.device = CPU,
    shard: tuple[int, int] = (0, 1),
) -> tuple[EncodedLinear, ...]:
    """The parts of one row in shard t of T, from Megatron's whole weight and its scales.

    The weight may be anything that is cut like a tensor; codes are made on `device`.
    """
    t, T = shard
    sizes = decoder.sizes(1)
    parts = unshard_tensor(row.sharding, weight, sizes, t, T)
    if fmt.weight == "nf4":
        return tuple(_pack_nf4(part) for part in ([torch.cat(parts)] if row.is_fused else parts))

    def each(tensor: torch.Tensor | None) -> Sequence[Any]:
        """What belongs to each part of something that is of outputs, or the same for all."""
        if tensor is None or tensor.dim() == 0:
            return [tensor] * len(parts)
        return unshard_tensor(row.sharding, tensor, sizes, t, T)

    second = None
    if fmt.weight == "nvfp4":
        second = scale_from_amax(scales.weight_amax, "nvfp4")
    elif fmt.second_weight is not None:
        second = scale_from_amax(scales.weight_amax_2, fmt.second_weight)
    given = None
    if fmt.activation is not None and fmt.activation != "fp8_token":
        given = scale_from_amax(scales.input_amax, fmt.activation)
    pre_quant_scale = scales.pre_quant_scale
    if pre_quant_scale is not None:
        pre_quant_scale = shard_input(row.sharding, pre_quant_scale, t, T)
    packed = []
    for part, amax, b in zip(parts, each(scales.weight_amax), each(scales.low_rank_b), strict=True):
        codes = on_device(device, partial(encode, kind=fmt.weight), part, amax)
        if fmt.weight == "nvfp4":
            scale = on_device(device, nvfp4_scales, part, amax)
        else:
            scale = scale_from_amax(amax, fmt.weight)
        a = scales.low_rank_a
        packed.append(EncodedLinear(fmt.weight, codes, scale, second, given, pre_quant_scale, a, b))
    return tuple(packed)


def _pack_nf4(weight_OK: torch.Tensor) -> EncodedLinear:
    codes, absmax, nested_absmax = nf4.quantize(weight_OK)
    return EncodedLinear("nf4", codes, absmax, nested_absmax=nested_absmax)


def encode_layer(
    rows: Iterable[ParameterEntry],
    layer: int,
    read: ReadTensors,
    scales: Mapping[str, Any],
    fmt: QuantFormat | None,
    decoder: Decoder,
    device: torch.device = CPU,
    shard: tuple[int, int] = (0, 1),
) -> EncodedLayer:
    """One layer as shard t of T holds it, some rows at a time.

    Args:
        rows: the family's rows.
        layer: its index over the whole model.
        read: finds whole Megatron tensors by name, or what is cut like them and reads no more.
        scales: linear -> LinearScales of this layer; empty for 16 bit.
        fmt: the format, or None for 16 bit.
        decoder: facts.
        device: where codes are made; all that is returned is on the CPU.
        shard: (t, T).
    """

    def piece(row: ParameterEntry) -> EncodedEntry:
        (weight,) = read([row.megatron_name]).values()
        if fmt is not None and row.is_linear:
            given = (row, weight, scales[row.module_name], fmt, decoder, device, shard)
            return EncodedEntry(row, encode_entry(*given))
        return EncodedEntry(row, unshard_tensor(row.sharding, weight, decoder.sizes(1), *shard))

    return {row.module_name: piece(row.for_layer(layer)) for row in rows if row.per_layer}


def encode_ends(
    rows: Iterable[ParameterEntry],
    read: ReadTensors,
    decoder: Decoder,
    shard: tuple[int, int] = (0, 1),
) -> EncodedLayer:
    """Embedding, last norm and head, as shard t of T holds them."""
    pieces: EncodedLayer = {}
    for row in rows:
        if not row.per_layer:
            (tensor,) = read([row.megatron_name]).values()
            pieces[row.module_name] = EncodedEntry(
                row, unshard_tensor(row.sharding, tensor, decoder.sizes(1), *shard)
            )
    return pieces
