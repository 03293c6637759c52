"""Encode Megatron parameters into codes and scales.

Each parameter is unsharded, split into its Hugging Face parts, sharded for the serving TP, and
encoded on the device it lies on. Targets pack and name the result.

Legend: O output features, K input features, G groups of K, R rank of the low-rank branch; t
tensor-parallel rank and T tensor-parallel size of the serving layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.formats import KvCacheFormat, NumberFormat, QuantFormat
from nemo_vlm_ptq.numerics import encode, nvfp4_block_scales, scale_from_amax
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import shard_input, unshard_tensor
from nemo_vlm_ptq.targets.writing.map_rows import map_rows
from nemo_vlm_ptq.targets.writing.nf4_encoding import NestedAbsmax, quantize_nf4

# Names of Megatron parameters -> unsharded tensors, or objects that slice like them.
ReadTensors = Callable[[Iterable[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class EncodedLinear:
    """Codes and scales of one part of a quantized linear; None for what the format lacks.

    Codes and the block scales of nvfp4 are on the weight's device, all else in host memory.

    A part is q, k, v, gate, up, or a complete other linear. For nf4 it is a Hugging Face
    tensor, which may fuse parts.

    number_format: of the codes.
    codes: [O,K], unpacked: float8_e4m3fn (fp8), int8 (int8, int4), uint8 (nvfp4, nf4).
    scale: [], [O] or [O,G], float32; float8_e4m3fn for nvfp4.
    scale_2: [] (W4A8, nvfp4).
    input_scale: [], static.
    pre_quant_scale: [K].
    low_rank_a: [R,K].
    low_rank_b: [O,R].
    nested_absmax: quantized absmax values of nf4.
    """

    number_format: NumberFormat
    codes: torch.Tensor
    scale: torch.Tensor
    scale_2: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    low_rank_a: torch.Tensor | None = None
    low_rank_b: torch.Tensor | None = None
    nested_absmax: NestedAbsmax | None = None


@dataclass(frozen=True)
class KvScales:
    """Scales [] float32 of a layer's cached keys and values."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class EncodedEntry:
    """Parameter entry with its parts in order, encoded or in 16 bit."""

    entry: ParameterEntry
    parts: tuple[EncodedLinear, ...] | tuple[torch.Tensor, ...]


# Entries by ParameterEntry.module_name: linear_qkv, input_layernorm, ...
EncodedLayer = dict[str, EncodedEntry]


def kv_scales(key_amax: torch.Tensor, value_amax: torch.Tensor, kv: KvCacheFormat) -> KvScales:
    """Compute the KV cache scales of a layer from its amax values [].

    For nvfp4 the scale is amax / 448 as for fp8: modelopt 0.47 exports it and TensorRT-LLM 1.2
    reads it so, with e4m3 scales of blocks of 16 in units of it.
    """
    number_format: NumberFormat = "fp8" if kv.number_format == "nvfp4" else kv.number_format
    return KvScales(
        key=scale_from_amax(key_amax, number_format),
        value=scale_from_amax(value_amax, number_format),
    )


def group_settings(fmt: QuantFormat, group_size: int) -> dict[str, Any]:
    """Return the keys about groups in the quantization block of a config file."""
    if not fmt.grouped:
        return {}
    settings: dict[str, Any] = {"group_size": fmt.group(group_size)}
    if fmt.uses_pre_quant_scale or fmt.weight == "int4":
        settings |= {"has_zero_point": False, "pre_quant_scale": fmt.uses_pre_quant_scale}
    return settings


def encode_entry(
    entry: ParameterEntry,
    weight: Any,
    scales: Any,
    fmt: QuantFormat,
    decoder: Decoder,
    shard: tuple[int, int] = (0, 1),
) -> tuple[EncodedLinear, ...]:
    """Encode one shard of a linear; return its parts in the entry's order.

    Args:
        entry: entry of the linear.
        weight: unsharded, prepared Megatron weight, or an object that slices like it.
        scales: LinearScales of the unsharded weight.
        fmt: quantization format.
        decoder: shape of the decoder.
        shard: (t, T).
    """
    t, T = shard
    sizes = decoder.sizes(1, entry.first_layer)
    parts = unshard_tensor(entry.sharding, weight, sizes, t, T)
    if fmt.weight == "nf4":
        tensors = [torch.cat(parts)] if entry.is_fused else parts
        return tuple(_encode_nf4(tensor.cpu()) for tensor in tensors)

    def per_part(tensor: torch.Tensor | None) -> Sequence[Any]:
        """Split a tensor with output channels like the weight; repeat any other for each part."""
        if tensor is None or tensor.dim() == 0:
            return [tensor] * len(parts)
        return unshard_tensor(entry.sharding, tensor, sizes, t, T)

    scale_2, input_scale = _per_tensor_scales(scales, fmt)
    pre_quant_scale = scales.pre_quant_scale
    if pre_quant_scale is not None:
        pre_quant_scale = shard_input(entry.sharding, pre_quant_scale, t, T)
    encoded = []
    amaxes, low_rank_b = per_part(scales.weight_amax), per_part(scales.low_rank_b)
    for part_OK, amax, b_OR in zip(parts, amaxes, low_rank_b, strict=True):
        function = partial(encode, number_format=fmt.weight)
        amax_on_device = amax.to(part_OK.device)
        codes_OK = map_rows(function, part_OK, amax_on_device)
        if fmt.weight == "nvfp4":
            scale = map_rows(nvfp4_block_scales, part_OK, amax_on_device)
        else:
            scale = scale_from_amax(amax, fmt.weight)
        encoded.append(
            EncodedLinear(
                number_format=fmt.weight,
                codes=codes_OK,
                scale=scale,
                scale_2=scale_2,
                input_scale=input_scale,
                pre_quant_scale=pre_quant_scale,
                low_rank_a=scales.low_rank_a,
                low_rank_b=b_OR,
            )
        )
    return tuple(encoded)


def _per_tensor_scales(
    scales: Any, fmt: QuantFormat
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return scale_2 [] and input_scale []; None for what the format lacks."""
    scale_2 = None
    if fmt.weight == "nvfp4":
        scale_2 = scale_from_amax(scales.weight_amax, "nvfp4")
    elif fmt.second_weight is not None:
        scale_2 = scale_from_amax(scales.weight_amax_2, fmt.second_weight)
    input_scale = None
    if fmt.activation is not None and fmt.activation != "fp8_token":
        input_scale = scale_from_amax(scales.input_amax, fmt.activation)
    return scale_2, input_scale


def _encode_nf4(weight_OK: torch.Tensor) -> EncodedLinear:
    codes_OK, absmax_OG, nested_absmax = quantize_nf4(weight_OK)
    return EncodedLinear(
        number_format="nf4", codes=codes_OK, scale=absmax_OG, nested_absmax=nested_absmax
    )


def encode_layer(
    parameter_map: Iterable[ParameterEntry],
    layer: int,
    read: ReadTensors,
    scales: Mapping[str, Any],
    fmt: QuantFormat | None,
    decoder: Decoder,
    shard: tuple[int, int] = (0, 1),
) -> EncodedLayer:
    """Encode one shard of a layer.

    Args:
        parameter_map: of the model family.
        layer: global layer index.
        read: reads unsharded Megatron tensors by name, or objects that slice like them lazily.
        scales: linear -> LinearScales of this layer; unused for 16 bit.
        fmt: quantization format; None for 16 bit.
        decoder: shape of the decoder.
        shard: (t, T).
    """

    def encoded(entry: ParameterEntry) -> EncodedEntry:
        (tensor,) = read([entry.megatron_name]).values()
        if fmt is not None and entry.is_linear:
            linear_scales = scales[entry.module_name]
            parts = encode_entry(entry, tensor, linear_scales, fmt, decoder, shard)
            return EncodedEntry(entry=entry, parts=parts)
        sizes = decoder.sizes(1, entry.first_layer)
        plain = unshard_tensor(entry.sharding, tensor, sizes, *shard)
        return EncodedEntry(entry=entry, parts=plain)

    return {
        entry.module_name: encoded(entry.for_layer(layer))
        for entry in parameter_map
        if entry.in_layer(layer)
    }


def encode_ends(
    parameter_map: Iterable[ParameterEntry],
    read: ReadTensors,
    decoder: Decoder,
    shard: tuple[int, int] = (0, 1),
) -> EncodedLayer:
    """Return one shard of embedding, final norm and own head, which stay in 16 bit."""
    ends: EncodedLayer = {}
    for entry in parameter_map:
        if not entry.per_layer and not entry.is_tied:
            (tensor,) = read([entry.megatron_name]).values()
            parts = unshard_tensor(entry.sharding, tensor, decoder.sizes(1), *shard)
            ends[entry.module_name] = EncodedEntry(entry=entry, parts=parts)
    return ends
