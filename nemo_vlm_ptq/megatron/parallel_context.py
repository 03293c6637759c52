"""One process group for all stages of a run: NCCL when every rank has a GPU, gloo otherwise.

Also the one place that reads the environment of a rank and that bends CUDA calls of megatron-core
which have no CPU form; with a GPU present nothing is bent.
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_vlm_ptq.distributed.layout import Layout, data_parallel_size


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place: coordinates in the layout, its devices, and its groups."""

    layout: Layout
    rank: int
    tensor: int
    pipeline: int
    data: int
    device: torch.device
    comm_device: torch.device  # where tensors lie while they are sent from rank to rank

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Ranks that share the shards of one layer."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard and see different samples."""
        return parallel_state.get_data_parallel_group()

    @property
    def first_stage(self) -> bool:
        """This rank embeds tokens and looks at images."""
        return self.pipeline == 0

    @property
    def last_stage(self) -> bool:
        """This rank has the head."""
        return self.pipeline == self.layout.pipeline - 1

    def peer(self, offset: int) -> int:
        """Global rank of the pipeline stage `offset` after this one."""
        return self.rank + offset * self.layout.tensor * self.layout.data

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """One value of each rank, on every rank."""
        values: list[Any] = [None] * self.layout.world
        dist.all_gather_object(values, value)
        return values

    def log(self, message: str) -> None:
        """One line on stderr from this rank."""
        print(f"[rank {self.rank}] {message}", file=sys.stderr, flush=True)


def rank_and_world() -> tuple[int, int, int]:
    """(rank, world, local rank) that torchrun put into the environment; (0, 1, 0) without it."""
    get = os.environ.get
    return int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0"))


def _bend_for_cpu() -> None:
    """megatron-core asks CUDA for the current device and for a sync; answer for the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None


def _choose_device(local: int) -> tuple[torch.device, torch.device]:
    """(device of this rank, device its messages leave from).

    NCCL needs a GPU of its own for every rank; ranks that share one talk over gloo.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        _bend_for_cpu()
        torch.set_num_threads(cores_per_rank())
        return torch.device("cpu"), torch.device("cpu")
    device = torch.device("cuda", local % gpus)
    torch.cuda.set_device(device)
    return device, device if local_world() <= gpus else torch.device("cpu")


def _start_group(rank: int, world: int, backend: str) -> None:
    patience = datetime.timedelta(minutes=30)
    if world > 1:
        dist.init_process_group(backend, timeout=patience)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=patience)


@contextmanager
def parallel_context(parallel: Mapping[str, Any]) -> Iterator[ParallelContext]:
    """Join the ranks that were started and lay the three axes over them.

    Until it ends, Python does not look for garbage among what is there already, packages above all:
    each look takes half a second.

    Args:
        parallel: tensor, pipeline and data (or "auto") of the recipe.

    Raises:
        UserError: the sizes do not make up the number of ranks.
    """
    rank, world, local = rank_and_world()
    data = None if parallel["data"] == "auto" else int(parallel["data"])
    tensor, pipeline = int(parallel["tensor"]), int(parallel["pipeline"])
    layout = Layout(tensor, pipeline, data_parallel_size(tensor, pipeline, world, data))
    device, comm_device = _choose_device(local)
    _start_group(rank, world, "gloo" if comm_device.type == "cpu" else "cpu:gloo,cuda:nccl")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    whole = False
    gc.freeze()
    try:
        t, p, d = layout.coordinates(rank)
        yield ParallelContext(layout, rank, t, p, d, device, comm_device)
        whole = True
    finally:
        gc.unfreeze()  # nanobind would call it leaked
        if whole or world == 1:  # NCCL's shutdown waits for peers, and they for a rank that failed
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take: its part of what nobody uses."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // local_world()
    sharing = -(-local_world() // torch.cuda.device_count())
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] // sharing + unused


def local_world() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores_per_rank() -> int:
    """Cores of this host that a rank may take for itself."""
    return max(1, len(os.sched_getaffinity(0)) // local_world())
