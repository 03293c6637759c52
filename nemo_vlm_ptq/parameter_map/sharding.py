"""Shard Hugging Face tensors into Megatron parameters, and unshard them again.

Pure tensor arithmetic, without process groups or files. Functions accept anything that slices like
a tensor, e.g. a safetensors slice, and read only the slices of one shard.

Legend: O output features, K input features, G groups of K; t tensor-parallel rank, T
tensor-parallel size. Tensors whose first dimension is O (weight [O,K], per-channel scale [O],
per-group scale [O,G]) are sharded like their weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch

# replicate: on every rank; column: along O; row: along K; vocab: along O, padded;
# gated: gate and up, each along O; qkv: q, k and v, interleaved per KV head, along KV heads;
# qk: the same without v.
Sharding = Literal["replicate", "column", "row", "gated", "qkv", "qk", "vocab"]
# Number of HF tensors that Megatron merges into one parameter; HF may fuse them, too.
MERGED_PARTS: dict[str, int] = {"gated": 2, "qkv": 3, "qk": 2}


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """Sizes of a decoder that determine its sharding; `padded_vocab` includes padding.

    output_gate: q has, for each head, the rows of the query and those of a gate.
    """

    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    padded_vocab: int
    output_gate: bool = False

    @property
    def q_heads(self) -> int:
        """Blocks of head_dim rows in q."""
        return self.heads * (1 + self.output_gate)

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, kw_only=True)
class RowSlice:
    """Lazy view of rows [start, start + rows) of a tensor or of another lazy slice."""

    whole: Any
    start: int
    rows: int

    def get_shape(self) -> list[int]:
        """Return [rows, ...], like a safetensors slice."""
        return [self.rows, *_shape(self.whole)[1:]]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Read rows of the view."""
        start, stop, _ = rows.indices(self.rows)
        return self.whole[self.start + start : self.start + stop]


def split_fused(sharding: Sharding, fused: Any, sizes: HeadSizes) -> list[RowSlice]:
    """Split a fused tensor, [q|k|v] or [gate|up] along its first dimension, into its parts."""
    heads = (sizes.q_heads, sizes.kv_heads, sizes.kv_heads)
    ratios = (1, 1) if sharding == "gated" else heads[: MERGED_PARTS[sharding]]
    unit = _shape(fused)[0] // sum(ratios)
    ends = list(accumulate(ratio * unit for ratio in ratios))
    starts = [0, *ends[:-1]]
    return [
        RowSlice(whole=fused, start=start, rows=end - start)
        for start, end in zip(starts, ends, strict=True)
    ]


def shard_tensor(
    sharding: Sharding, parts: Sequence[Any], sizes: HeadSizes, t: int, T: int
) -> torch.Tensor:
    """Return Megatron's shard `t` of `T` of one parameter.

    Args:
        sharding: of the parameter.
        parts: its HF tensors, or one fused tensor.
        sizes: of the decoder; a vocabulary is zero-padded to `padded_vocab` rows.
        t: tensor-parallel rank.
        T: tensor-parallel size.
    """
    if len(parts) < MERGED_PARTS.get(sharding, 1):
        parts = split_fused(sharding, parts[0], sizes)
    if sharding in ("qkv", "qk"):
        return _shard_qkv(parts, sizes, t, T)
    if sharding == "gated":
        return torch.cat([_shard_rows(part, t, T) for part in parts])
    (part,) = parts
    if sharding == "replicate":
        return part[:]
    if sharding == "vocab":
        return _shard_vocab(part, sizes, t, T)
    if sharding == "row":
        if len(_shape(part)) == 1:  # per-output-channel vectors are replicated
            return part[:]
        width = _shape(part)[1] // T
        return part[:, t * width : (t + 1) * width]
    return _shard_rows(part, t, T)


def unshard_tensor(
    sharding: Sharding, whole: Any, sizes: HeadSizes, t: int = 0, T: int = 1
) -> tuple[torch.Tensor, ...]:
    """Split Megatron's full parameter into its HF tensors, or into shard `t` of `T` of each.

    The inverse of `shard_tensor(..., 0, 1)` for t = 0, T = 1. If T exceeds the number of KV heads,
    KV heads are repeated. A vocabulary loses its padding and is padded to a multiple of T.
    """
    if sharding in ("qkv", "qk"):
        return _unshard_qkv(whole, sizes, t, T, MERGED_PARTS[sharding])
    if sharding == "gated":
        half = _shape(whole)[0] // 2
        halves = [RowSlice(whole=whole, start=start, rows=half) for start in (0, half)]
        return tuple(_shard_rows(part, t, T) for part in halves)
    if sharding == "vocab":
        padded = replace(sizes, padded_vocab=-(-sizes.vocab // T) * T)
        unpadded = RowSlice(whole=whole, start=0, rows=sizes.vocab)
        return (_shard_vocab(unpadded, padded, t, T),)
    return (shard_tensor(sharding, [whole], sizes, t, T),)


def shard_input(sharding: Sharding, vector_K: torch.Tensor, t: int, T: int) -> torch.Tensor:
    """Return the part of a per-input-channel vector [K] that matches shard `t` of a weight."""
    return _shard_rows(vector_K, t, T) if sharding == "row" else vector_K


def _shape(part: Any) -> Sequence[int]:
    return part.shape if isinstance(part, torch.Tensor) else part.get_shape()


def _shard_rows(part: Any, t: int, T: int) -> torch.Tensor:
    rows = _shape(part)[0] // T
    return part[t * rows : (t + 1) * rows]


def _shard_vocab(part: Any, sizes: HeadSizes, t: int, T: int) -> torch.Tensor:
    rows = sizes.padded_vocab // T
    local = part[min(t * rows, sizes.vocab) : min((t + 1) * rows, sizes.vocab)]
    padding = rows - local.shape[0]
    return torch.cat([local, local.new_zeros(padding, local.shape[1])]) if padding else local


def _shard_qkv(parts: Sequence[Any], sizes: HeadSizes, t: int, T: int) -> torch.Tensor:
    """Concatenate, for each KV head of the shard, its query heads, its k and, if given, its v.

    Gates follow all query heads of their KV head, as megatron-core expects them.
    """
    kv_heads = sizes.kv_heads // T
    grouped = []
    heads = (sizes.q_heads // sizes.kv_heads, 1, 1)
    for part, heads_per_group in zip(parts, heads[: len(parts)], strict=True):
        rows = kv_heads * heads_per_group * sizes.head_dim
        local = part[t * rows : (t + 1) * rows]
        if sizes.output_gate and heads_per_group > 1:
            local = _swap_gates(local, kv_heads, sizes.queries_per_kv_head, 2)
        grouped.append(local.reshape(kv_heads, heads_per_group * sizes.head_dim, *local.shape[1:]))
    merged = torch.cat(grouped, dim=1)
    return merged.reshape(-1, *merged.shape[2:])


def _swap_gates(rows: torch.Tensor, kv_heads: int, first: int, second: int) -> torch.Tensor:
    """Reorder rows [kv_heads, first, second, head_dim] to [kv_heads, second, first, head_dim]."""
    blocks = rows.unflatten(0, (kv_heads, first, second, -1))
    return blocks.transpose(1, 2).flatten(0, 3)


def _unshard_qkv(
    whole: Any, sizes: HeadSizes, t: int, T: int, count: int
) -> tuple[torch.Tensor, ...]:
    """Return the q, k and v rows of the heads of shard `t`, or the first `count` of the three."""
    dim, queries_per_kv_head = sizes.head_dim, sizes.q_heads // sizes.kv_heads
    first_kv_head, kv_heads = t * sizes.kv_heads // T, max(1, sizes.kv_heads // T)
    rows = [queries_per_kv_head * dim, dim, dim][:count]  # of q, k and v per KV head
    local = whole[first_kv_head * sum(rows) : (first_kv_head + kv_heads) * sum(rows)]
    grouped = local.reshape(kv_heads, sum(rows), *local.shape[1:])
    q, *others = (
        part.reshape(-1, *local.shape[1:]).contiguous() for part in grouped.split(rows, dim=1)
    )
    if sizes.output_gate:
        q = _swap_gates(q, kv_heads, 2, sizes.queries_per_kv_head)
    # With fewer KV heads than shards, the local group has more query heads than the shard.
    first_row = (t * sizes.q_heads // T - first_kv_head * queries_per_kv_head) * dim
    return q[first_row : first_row + sizes.q_heads // T * dim], *others
