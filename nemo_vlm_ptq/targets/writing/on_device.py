"""Apply a function to slices of a weight's rows on a device, to bound its memory.

Slices are copied to a GPU and back through pinned memory, in a stream of their own, so that export
overlaps with other work on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_vlm_ptq.utils.pinned_memory import to_device

CPU_SLICE_NUMEL, GPU_SLICE_NUMEL = 1 << 20, 1 << 24  # elements of a weight per slice


def map_rows_on_device(
    device: torch.device,
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weight_OK: torch.Tensor,
    amax: torch.Tensor,
) -> torch.Tensor:
    """Compute `function(weight_OK, amax)` in slices of rows.

    Args:
        device: device of the computation.
        function: computes each row of its result from the same row of its arguments.
        weight_OK: weight, on any device.
        amax: [] or [O,...].

    Returns:
        The result, in host memory.
    """
    result: torch.Tensor | None = None
    on_gpu = device.type == "cuda"
    step = max(1, (GPU_SLICE_NUMEL if on_gpu else CPU_SLICE_NUMEL) // weight_OK.shape[1])
    stream = torch.cuda.Stream(device) if on_gpu else None
    with torch.cuda.stream(stream):  # no effect for None
        for start in range(0, len(weight_OK), step):
            rows = slice(start, start + step)
            amax_slice = amax[rows] if amax.dim() else amax
            part = function(to_device(weight_OK[rows], device), amax_slice.to(device))
            if result is None:
                shape = (len(weight_OK), *part.shape[1:])
                result = torch.empty(shape, dtype=part.dtype, pin_memory=on_gpu)
            result[rows].copy_(part, non_blocking=True)
    if stream is not None:
        stream.synchronize()
    assert result is not None, "weight_OK must have at least one row"
    return result
