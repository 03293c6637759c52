"""The stream every export target is written from: Hugging Face names, codes and scales.

A layer is read whole from the quantized checkpoint, encoded, and taken apart by its rows; targets
put the parts together in their own way. There is no shorter way when the layouts agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.mapping.layouts import give
from nemo_vlm_ptq.mapping.rows import Row
from nemo_vlm_ptq.numerics import encode, scale_of

ReadTensors = Callable[[Iterable[str]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Packed:
    """One quantized linear under its Hugging Face name, without `.weight`.

    codes [O,K] float8_e4m3fn or int8 (int4 not packed yet); scale [], [O] or [O,G] float32;
    scale_2 [] (W4A8), input_scale [], prequant [K]; None where the format has none.
    """

    name: str
    codes: torch.Tensor
    scale: torch.Tensor
    scale_2: torch.Tensor | None
    input_scale: torch.Tensor | None
    prequant: torch.Tensor | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its quantized linears and its plain tensors, by Hugging Face name."""

    linears: dict[str, Packed]
    plain: dict[str, torch.Tensor]


def pack_row(
    row: Row, weight: torch.Tensor, scales: Any, fmt: QuantFormat, decoder: Decoder
) -> list[Packed]:
    """The Hugging Face linears of one row, from Megatron's whole weight and its scales."""
    scale = scale_of(scales.weight_amax, fmt.weight)
    codes = encode(weight, scales.weight_amax, fmt.weight)
    sizes = decoder.sizes(1)
    whole_codes = give(row.layout, codes.view(torch.int8), sizes)
    whole_scale = (
        give(row.layout, scale, sizes) if scale.dim() else tuple(scale for _ in whole_codes)
    )
    second = None
    if fmt.weight_second is not None:
        second = scale_of(scales.weight_amax_2, fmt.weight_second)
    given = None if fmt.activation is None else scale_of(scales.input_amax, fmt.activation)
    return [
        Packed(
            name.removesuffix(".weight"),
            part.view(codes.dtype),
            part_scale,
            second,
            given,
            scales.prequant,
        )
        for name, part, part_scale in zip(row.hf, whole_codes, whole_scale, strict=True)
    ]


def stream_layer(
    rows: Iterable[Row],
    layer: int,
    read: ReadTensors,
    scales: Mapping[str, Any],
    fmt: QuantFormat | None,
    decoder: Decoder,
) -> Layer:
    """One layer in Hugging Face names.

    Args:
        rows: the family's rows.
        layer: its index over the whole model.
        read: reads whole Megatron tensors by name.
        scales: linear -> LinearScales of this layer; empty for 16 bit.
        fmt: the format, or None for 16 bit.
        decoder: facts.
    """
    linears: dict[str, Packed] = {}
    plain: dict[str, torch.Tensor] = {}
    for row in (row.at(layer) for row in rows if row.layered):
        (weight,) = read([row.megatron]).values()
        if fmt is not None and row.linear:
            entry = scales[row.megatron.split(".")[-2]]
            for packed in pack_row(row, weight, entry, fmt, decoder):
                linears[packed.name] = packed
        else:
            parts = give(row.layout, weight, decoder.sizes(1))
            plain.update(zip(row.hf, parts, strict=True))
    return Layer(linears, plain)


def stream_ends(
    rows: Iterable[Row], read: ReadTensors, decoder: Decoder
) -> dict[str, torch.Tensor]:
    """Tensors outside the layers (embedding, last norm, head) in Hugging Face names."""
    ends: dict[str, torch.Tensor] = {}
    for row in rows:
        if not row.layered:
            (tensor,) = read([row.megatron]).values()
            ends.update(zip(row.hf, give(row.layout, tensor, decoder.sizes(1)), strict=True))
    return ends
