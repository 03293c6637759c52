"""Parallel arithmetic without a process group: who holds what, for any number of ranks.

Rank order is Megatron-core's default: tensor fastest, then data, then pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from nemo_vlm_ptq.errors import UserError

Item = TypeVar("Item")
WIDE_INPUT = 8192  # from here on a second moment is cut into eight strips, below into four
MIN_STRIP_ROWS = 64  # rows of a strip


@dataclass(frozen=True)
class Layout:
    """Sizes of the three parallel axes."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tensor, pipeline, data) index of a global rank."""
        tensor = rank % self.tensor
        data = rank // self.tensor % self.data
        return tensor, rank // (self.tensor * self.data), data

    def __str__(self) -> str:
        return f"TP {self.tensor} x PP {self.pipeline} x DP {self.data}"


def divisors(number: int, limit: int = 64) -> list[int]:
    """Divisors of `number` up to `limit`, ascending."""
    return [d for d in range(1, limit + 1) if number % d == 0]


def split_evenly(items: Sequence[Item], parts: int, index: int) -> Sequence[Item]:
    """Contiguous share `index` of `parts`; the first shares take the remainder.

    This is `torch.tensor_split`, the rule of TensorRT-LLM 1.x for layers over pipeline ranks.
    """
    size, extra = divmod(len(items), parts)
    start = index * size + min(index, extra)
    return items[start : start + size + (index < extra)]


def round_robin(items: Sequence[Item], parts: int, index: int) -> Sequence[Item]:
    """Every `parts`-th item from `index`: shares are disjoint and their union is all items."""
    return items[index::parts]


def strips(width: int) -> list[slice]:
    """Rows of each strip of a symmetric [K,K]; one strip where several would be narrow.

    More strips are less work, as only what lies right of a strip's first row is made; but a GPU is
    not busy with one of few rows.
    """
    height, left = divmod(width, 8 if width >= WIDE_INPUT else 4)
    if left or height < MIN_STRIP_ROWS:
        return [slice(0, width)]
    return [slice(start, start + height) for start in range(0, width, height)]


def strip_owner(index: int, T: int) -> int:
    """Tensor rank of T that keeps a strip: dealt to and fro, long ones go with short ones."""
    turn, place = divmod(index, T)
    return place if turn % 2 == 0 else T - 1 - place


def strip_entries(width: int, t: int, T: int) -> int:
    """Numbers that tensor rank t of T keeps of a symmetric [K,K]: its strips from the diagonal."""
    own = [rows for i, rows in enumerate(strips(width)) if strip_owner(i, T) == t]
    return sum((rows.stop - rows.start) * (width - rows.start) for rows in own)


def data_parallel_size(tensor: int, pipeline: int, world: int, data: int | None) -> int:
    """Size of the data axis in a world of ranks.

    Raises:
        UserError: tensor * pipeline * data is not the world size.
    """
    model = tensor * pipeline
    if data is None:
        if world % model:
            raise UserError(
                f"{world} ranks cannot hold tensor {tensor} x pipeline {pipeline}: "
                f"start a multiple of {model} ranks"
            )
        return world // model
    if model * data != world:
        raise UserError(
            f"parallel: tensor {tensor} x pipeline {pipeline} x data {data} needs {model * data} "
            f"ranks but {world} were started; start {model * data}, or set parallel.data=auto"
        )
    return data
