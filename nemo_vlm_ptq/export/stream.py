"""The stream every export target is written from: rows, codes and scales.

A layer is read whole from the quantized checkpoint, encoded, and taken apart by its rows; targets
put the parts together in their own way, under their own names. There is no shorter way when the
layouts agree.
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
    """One part of a quantized linear: q, k, v, gate or up by itself, or a whole other linear.

    codes [O,K] float8_e4m3fn or int8 (int4 not packed yet) or uint8 nibbles (nvfp4, nf4, not packed
    yet); scale [], [O] or [O,G], float32 or, for nvfp4, float8_e4m3fn; scale_2 [] (W4A8, nvfp4),
    input_scale [], prequant [K], low_rank_a [r,K], low_rank_b [O,r]; None where the format has none.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    scale_2: torch.Tensor | None
    input_scale: torch.Tensor | None
    prequant: torch.Tensor | None
    low_rank_a: torch.Tensor | None = None
    low_rank_b: torch.Tensor | None = None


@dataclass(frozen=True)
class Piece:
    """One row of a layer (or of the ends): its parts in the row's order, packed or plain."""

    row: Row
    parts: tuple[Packed, ...] | tuple[torch.Tensor, ...]


Layer = dict[str, Piece]  # by Megatron's name without its prefix: linear_qkv, input_layernorm, ...


def pack_row(
    row: Row, weight: torch.Tensor, scales: Any, fmt: QuantFormat, decoder: Decoder
) -> tuple[Packed, ...]:
    """The parts of one row, from Megatron's whole weight and its scales."""
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
    return tuple(
        Packed(part.view(codes.dtype), part_scale, second, given, scales.prequant)
        for part, part_scale in zip(whole_codes, whole_scale, strict=True)
    )


def stream_layer(
    rows: Iterable[Row],
    layer: int,
    read: ReadTensors,
    scales: Mapping[str, Any],
    fmt: QuantFormat | None,
    decoder: Decoder,
) -> Layer:
    """One layer, row by row.

    Args:
        rows: the family's rows.
        layer: its index over the whole model.
        read: reads whole Megatron tensors by name.
        scales: linear -> LinearScales of this layer; empty for 16 bit.
        fmt: the format, or None for 16 bit.
        decoder: facts.
    """
    pieces: Layer = {}
    for row in (row.at(layer) for row in rows if row.layered):
        (weight,) = read([row.megatron]).values()
        if fmt is not None and row.linear:
            parts: Any = pack_row(row, weight, scales[row.short], fmt, decoder)
        else:
            parts = give(row.layout, weight, decoder.sizes(1))
        pieces[row.short] = Piece(row, parts)
    return pieces


def stream_ends(rows: Iterable[Row], read: ReadTensors, decoder: Decoder) -> Layer:
    """Embedding, last norm and head."""
    pieces: Layer = {}
    for row in rows:
        if not row.layered:
            (tensor,) = read([row.megatron]).values()
            pieces[row.short] = Piece(row, give(row.layout, tensor, decoder.sizes(1)))
    return pieces
