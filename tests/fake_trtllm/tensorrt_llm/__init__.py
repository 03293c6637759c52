"""Fake tensorrt_llm with the interface of 1.2, on the CPU."""

from types import SimpleNamespace

import torch

torch.Tensor.cuda = lambda self: self
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda index: None
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None)


def mpi_rank():
    """Return the rank of this process."""
    return 0


def mpi_barrier():
    """Do nothing: there are no other ranks."""
