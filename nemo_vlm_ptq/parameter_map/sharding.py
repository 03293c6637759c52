"""The closed set of layouts: how one Megatron tensor is cut from, and put back into, HF tensors.

Pure tensor arithmetic; nothing here knows of ranks or files. Every function works on anything that
can be sliced like a tensor, so that a safetensors slice reads only what a rank needs.

Legend: O output features, K input features, G groups of K; t index and T size of the tensor axis.
Tensors whose first axis is O (weights [O,K], per-channel scales [O], per-group scales [O,G]) all
follow the layout of their weight, so a scale travels by the row of its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch

Sharding = Literal["replicate", "column", "row", "gated", "qkv", "vocab"]
MERGED_PARTS: dict[str, int] = {
    "gated": 2,
    "qkv": 3,
}  # layouts of several HF tensors, or of one fused


@dataclass(frozen=True)
class HeadSizes:
    """What the layouts need to know of a decoder; `vocab_rows` is the vocabulary with padding."""

    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    padded_vocab: int

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class RowSlice:
    """Rows `start` to `start + rows` of anything that can be sliced, itself sliced as lazily."""

    whole: Any
    start: int
    rows: int

    def get_shape(self) -> list[int]:
        """[rows, ...]."""
        return [self.rows, *_shape(self.whole)[1:]]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Rows of the window."""
        start, stop, _ = rows.indices(self.rows)
        return self.whole[self.start + start : self.start + stop]


def unfuse(kind: Sharding, fused: Any, sizes: HeadSizes) -> list[RowSlice]:
    """The parts of a fused tensor, [Q|K|V] or [gate|up] along its first axis."""
    shares = (1, 1) if kind == "gated" else (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    unit = _shape(fused)[0] // sum(shares)
    ends = list(accumulate(share * unit for share in shares))
    starts = [0, *ends[:-1]]
    return [RowSlice(fused, start, end - start) for start, end in zip(starts, ends, strict=True)]


def shard_tensor(
    kind: Sharding, parts: Sequence[Any], sizes: HeadSizes, t: int, T: int
) -> torch.Tensor:
    """Megatron's shard `t` of `T` from the HF tensors of one row; vocab rows are zero-padded."""
    if len(parts) < MERGED_PARTS.get(kind, 1):
        parts = unfuse(kind, parts[0], sizes)
    if kind == "qkv":
        return _take_qkv(parts, sizes, t, T)
    if kind == "gated":
        return torch.cat([_cut(part, t, T) for part in parts])
    (part,) = parts
    if kind == "replicate":
        return part[:]
    if kind == "vocab":
        return _take_vocab(part, sizes, t, T)
    if kind == "row":  # a vector of outputs is whole on every shard
        if len(_shape(part)) == 1:
            return part[:]
        width = _shape(part)[1] // T
        return part[:, t * width : (t + 1) * width]
    return _cut(part, t, T)


def unshard_tensor(
    kind: Sharding, whole: Any, sizes: HeadSizes, t: int = 0, T: int = 1
) -> tuple[torch.Tensor, ...]:
    """What shard `t` of `T` holds of each HF tensor of one row, from Megatron's whole tensor.

    The inverse of `take(..., 0, 1)` for one shard. KV heads fewer than shards are repeated; a
    vocabulary loses its padding, and gets as much as T shards ask for.
    """
    if kind == "qkv":
        return _give_qkv(whole, sizes, t, T)
    if kind == "gated":
        half = _shape(whole)[0] // 2
        return tuple(_cut(RowSlice(whole, start, half), t, T) for start in (0, half))
    if kind == "vocab":
        padded = replace(sizes, padded_vocab=-(-sizes.vocab // T) * T)
        return (_take_vocab(RowSlice(whole, 0, sizes.vocab), padded, t, T),)
    return (shard_tensor(kind, [whole], sizes, t, T),)


def shard_input(kind: Sharding, vector_K: torch.Tensor, t: int, T: int) -> torch.Tensor:
    """The share of a per-input-channel vector [K] that belongs to shard `t` of a weight."""
    return _cut(vector_K, t, T) if kind == "row" else vector_K


def _shape(part: Any) -> Sequence[int]:
    return part.shape if isinstance(part, torch.Tensor) else part.get_shape()


def _cut(part: Any, t: int, T: int) -> torch.Tensor:
    rows = _shape(part)[0] // T
    return part[t * rows : (t + 1) * rows]


def _take_vocab(part: Any, sizes: HeadSizes, t: int, T: int) -> torch.Tensor:
    rows = sizes.padded_vocab // T
    local = part[min(t * rows, sizes.vocab) : min((t + 1) * rows, sizes.vocab)]
    missing = rows - local.shape[0]
    return torch.cat([local, local.new_zeros(missing, local.shape[1])]) if missing else local


def _take_qkv(parts: Sequence[Any], sizes: HeadSizes, t: int, T: int) -> torch.Tensor:
    """Rows of one shard: for each of its KV heads the query heads that share it, then k and v."""
    groups = sizes.kv_heads // T
    pieces = []
    for part, per_group in zip(parts, (sizes.queries_per_kv_head, 1, 1), strict=True):
        rows = groups * per_group * sizes.head_dim
        local = part[t * rows : (t + 1) * rows]
        pieces.append(local.reshape(groups, per_group * sizes.head_dim, *local.shape[1:]))
    merged = torch.cat(pieces, dim=1)
    return merged.reshape(-1, *merged.shape[2:])


def _give_qkv(whole: Any, sizes: HeadSizes, t: int, T: int) -> tuple[torch.Tensor, ...]:
    """Heads of one shard: those of q, of k and of v."""
    dim, queries_per_kv_head = sizes.head_dim, sizes.queries_per_kv_head
    first, groups = t * sizes.kv_heads // T, max(1, sizes.kv_heads // T)
    rows = [queries_per_kv_head * dim, dim, dim]
    local = whole[first * sum(rows) : (first + groups) * sum(rows)]
    grouped = local.reshape(groups, sum(rows), *local.shape[1:])
    q, k, v = (
        piece.reshape(-1, *local.shape[1:]).contiguous() for piece in grouped.split(rows, dim=1)
    )
    start, own = (t * sizes.heads // T - first * queries_per_kv_head) * dim, sizes.heads // T * dim
    return q[start : start + own], k, v
