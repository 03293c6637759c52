"""Process groups and the coordinates of this rank, for all stages of a run.

The backend is NCCL if every rank has its own GPU, gloo otherwise. Without a GPU, two CUDA calls of
megatron-core that have no CPU implementation are replaced.
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

from nemo_vlm_ptq.distributed.launcher import STORE_VARIABLE
from nemo_vlm_ptq.distributed.layout import Layout, data_parallel_size

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Coordinates of this rank in the parallel layout, its devices and its process groups."""

    layout: Layout
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    device: torch.device
    comm_device: torch.device  # device of tensors passed to point-to-point communication

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Tensor-parallel group: ranks that hold the shards of the same layers."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Data-parallel group: ranks that hold the same shard and process different samples."""
        return parallel_state.get_data_parallel_group()

    @property
    def first_stage(self) -> bool:
        """Whether this rank is in the first pipeline stage (token embedding, vision tower)."""
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank is in the last pipeline stage (output layer)."""
        return self.pipeline_rank == self.layout.pipeline - 1

    def pipeline_peer(self, offset: int) -> int:
        """Return the global rank `offset` pipeline stages after this one."""
        return self.rank + offset * self.layout.tensor * self.layout.data

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def all_gather(self, value: Any) -> list[Any]:
        """Return the pickled values of all ranks, in rank order, on every rank (collective)."""
        values: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(values, value)
        return values

    def log(self, message: str) -> None:
        """Print one line to stderr, prefixed with this rank."""
        print(f"[rank {self.rank}] {message}", file=sys.stderr, flush=True)


def rank_and_world() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from torchrun's environment; (0, 1, 0) without it."""
    get = os.environ.get
    return int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0"))


def _patch_cuda_for_cpu() -> None:
    """Replace the CUDA calls that megatron-core makes unconditionally."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None


def _select_devices(local_rank: int) -> tuple[torch.device, torch.device]:
    """Return (compute device, communication device) of this rank.

    NCCL requires one GPU per rank; ranks that share a GPU communicate over gloo.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        _patch_cuda_for_cpu()
        torch.set_num_threads(cores_per_rank())
        return torch.device("cpu"), torch.device("cpu")
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new sequence length, on the host
    return device, device if local_world_size() <= gpus else torch.device("cpu")


def _init_process_group(rank: int, world_size: int, backend: str) -> None:
    """Initialize torch.distributed; its store listens where the launcher has chosen.

    Only ranks of torchrun or of a launcher of the user take torch's own choice, all addresses.
    """
    descriptor = os.environ.get(STORE_VARIABLE)
    store: dist.Store | None = None
    if world_size == 1:
        store = dist.HashStore()
    elif descriptor is not None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own: dict[str, Any] = {"master_listen_fd": int(descriptor)} if descriptor else {}
        store = dist.TCPStore(address, port, world_size, rank == 0, COLLECTIVE_TIMEOUT, **own)
    numbers = (-1, -1) if store is None else (world_size, rank)  # else of the environment
    dist.init_process_group(backend, None, COLLECTIVE_TIMEOUT, *numbers, store)


@contextmanager
def parallel_context(parallel: Mapping[str, Any]) -> Iterator[ParallelContext]:
    """Initialize the process groups, and destroy them on exit.

    Objects that exist at entry are excluded from garbage collection until exit: traversing the
    imported packages takes half a second per collection.

    Args:
        parallel: the sizes tensor, pipeline and data of the recipe; data may be "auto".

    Raises:
        UserError: the product of the sizes is not the world size.
    """
    rank, world_size, local_rank = rank_and_world()
    data = None if parallel["data"] == "auto" else int(parallel["data"])
    tensor, pipeline = int(parallel["tensor"]), int(parallel["pipeline"])
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=data_parallel_size(tensor, pipeline, world_size, data),
    )
    device, comm_device = _select_devices(local_rank)
    backend = "gloo" if comm_device.type == "cpu" else "cpu:gloo,cuda:nccl"
    _init_process_group(rank, world_size, backend)
    parallel_state.initialize_model_parallel(tensor, pipeline)
    succeeded = False
    gc.freeze()
    try:
        tensor_rank, pipeline_rank, data_rank = layout.coordinates(rank)
        yield ParallelContext(
            layout=layout,
            rank=rank,
            tensor_rank=tensor_rank,
            pipeline_rank=pipeline_rank,
            data_rank=data_rank,
            device=device,
            comm_device=comm_device,
        )
        succeeded = True
    finally:
        gc.unfreeze()  # nanobind reports frozen objects as leaked at interpreter exit
        # After a failure NCCL's shutdown waits for the peers, which wait for this rank.
        if succeeded or world_size == 1:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def free_memory(device: torch.device) -> int:
    """Return the bytes available to this rank: an equal share of the free memory of the device."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // local_world_size()
    ranks_per_gpu = -(-local_world_size() // torch.cuda.device_count())
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] // ranks_per_gpu + cached


def local_world_size() -> int:
    """Return the number of ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores_per_rank() -> int:
    """Return the number of CPU cores available to each rank on this host, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())
