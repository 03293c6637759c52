"""Stands for TensorRT-LLM where there is no GPU: its calls as 1.2 has them, on the CPU."""

from types import SimpleNamespace

import torch

torch.Tensor.cuda = lambda self: self
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda index: None
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None)


def mpi_rank():
    """The rank of this process."""
    return 0


def mpi_barrier():
    """Wait for the other ranks: there are none."""
