"""Arithmetic over a weight some rows at a time, on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_vlm_ptq.utils.pinned_memory import to_device

CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 24  # entries of a weight that are dealt with at a time


def on_device(
    device: torch.device,
    make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weight_OK: torch.Tensor,
    amax: torch.Tensor,
) -> torch.Tensor:
    """`make(weight, amax)`, such as `encode`, some rows at a time on a device, in little memory.

    Args:
        device: where it is made; what is returned is on the CPU.
        make: makes rows of its result from rows alone.
        weight_OK: the weight.
        amax: as `make` takes it.
    """
    made: torch.Tensor | None = None
    gpu = device.type == "cuda"
    step = max(1, (GPU_CHUNK if gpu else CPU_CHUNK) // weight_OK.shape[1])
    stream = torch.cuda.Stream(device) if gpu else None
    with torch.cuda.stream(stream):  # None: nothing changes
        for start in range(0, len(weight_OK), step):
            rows = slice(start, start + step)
            own = amax[rows] if amax.dim() else amax
            part = make(to_device(weight_OK[rows], device), own.to(device))
            if made is None:
                shape = (len(weight_OK), *part.shape[1:])
                made = torch.empty(shape, dtype=part.dtype, pin_memory=gpu)
            made[rows].copy_(part, non_blocking=True)
    if stream is not None:
        stream.synchronize()
    assert made is not None, "a weight has rows"
    return made
