"""Copies between host and GPU through pinned memory, several times as fast as pageable copies.

On an H200 a pageable copy into untouched host memory took nine times as long, and one from a
memory-mapped file to the GPU two and a half times (docs/dev/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

STAGING_BYTES = 1 << 26  # size of a pinned buffer; torch's allocator reuses it for later copies


def copy_pinned(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` into `target` through pinned memory, as `target.copy_(source)` would.

    A copy to a GPU is asynchronous: it has been queued in the current stream on return.
    """
    device = target.device if target.is_cuda else source.device
    if target.device == source.device or not source.numel():
        target.copy_(source)
        return
    target, source = torch.atleast_1d(target), torch.atleast_1d(source)
    rows = max(1, STAGING_BYTES * len(source) // source.nbytes)
    with torch.cuda.device(device):  # pinned memory belongs to the current device
        for target_rows, source_rows in zip(target.split(rows), source.split(rows), strict=True):
            staging = torch.empty(source_rows.shape, dtype=source_rows.dtype, pin_memory=True)
            target_rows.copy_(staging.copy_(source_rows), non_blocking=True)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on a device: itself if it is there, else a copy made by `copy_pinned`."""
    if tensor.device == device:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    copy_pinned(copy, tensor)
    return copy


def to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors in host memory; the copies of GPU tensors are queued in the current stream."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    return {name: copy(tensor) for name, tensor in tensors.items()}


def start_copy_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start an asynchronous copy of a small tensor to pinned host memory.

    Returns:
        A function that waits for the copy and returns the host tensor.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return host

    return wait
