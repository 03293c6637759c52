"""Parallel layout arithmetic without a process group.

The plan and the automatic choice of a layout need it before any rank is started. Ranks are ordered
as Megatron-core orders them by default: tensor fastest, then data, then pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from nemo_vlm_ptq.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the three parallel axes."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return the (tensor, pipeline, data) index of a global rank."""
        tensor = rank % self.tensor
        data = rank // self.tensor % self.data
        return tensor, rank // (self.tensor * self.data), data

    def __str__(self) -> str:
        return f"TP {self.tensor} x PP {self.pipeline} x DP {self.data}"


def divisors(number: int, limit: int = 64) -> list[int]:
    """Return the divisors of `number` up to `limit` in ascending order."""
    return [d for d in range(1, limit + 1) if number % d == 0]


def split_evenly(items: Sequence[Item], parts: int, index: int) -> Sequence[Item]:
    """Return contiguous part `index` of `parts`; the first parts take the remainder.

    Equals `torch.tensor_split`, by which TensorRT-LLM 1.x assigns layers to pipeline ranks.
    """
    size, extra = divmod(len(items), parts)
    start = index * size + min(index, extra)
    return items[start : start + size + (index < extra)]


def round_robin(items: Sequence[Item], parts: int, index: int) -> Sequence[Item]:
    """Return every `parts`-th item from `index`; the parts are disjoint and cover all items."""
    return items[index::parts]


def data_parallel_size(tensor: int, pipeline: int, world_size: int, data: int | None) -> int:
    """Return the data-parallel size that fills the world.

    Args:
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        world_size: number of ranks.
        data: requested data-parallel size, or None to derive it.

    Raises:
        UserError: tensor * pipeline * data is not the world size.
    """
    model = tensor * pipeline
    if data is None:
        if world_size % model:
            raise UserError(
                f"{world_size} ranks cannot hold tensor {tensor} x pipeline {pipeline}: "
                f"start a multiple of {model} ranks"
            )
        return world_size // model
    if model * data != world_size:
        raise UserError(
            f"parallel: tensor {tensor} x pipeline {pipeline} x data {data} needs {model * data} "
            f"ranks but {world_size} were started; start {model * data}, "
            "or set parallel.data=auto"
        )
    return data
