"""Apply a function to slices of a weight's rows, which bounds the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

CPU_SLICE_NUMEL, GPU_SLICE_NUMEL = 1 << 20, 1 << 24  # elements of a weight per slice


def map_rows(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weight_OK: torch.Tensor,
    amax: torch.Tensor,
) -> torch.Tensor:
    """Compute `function(weight_OK, amax)` in slices of rows.

    Args:
        function: computes each row of its result from the same row of its arguments.
        weight_OK: weight.
        amax: [] or [O,...], on the same device.
    """
    result: torch.Tensor | None = None
    step = max(1, (GPU_SLICE_NUMEL if weight_OK.is_cuda else CPU_SLICE_NUMEL) // weight_OK.shape[1])
    for start in range(0, len(weight_OK), step):
        rows = slice(start, start + step)
        part = function(weight_OK[rows], amax[rows] if amax.dim() else amax)
        if result is None:
            shape = (len(weight_OK), *part.shape[1:])
            result = torch.empty(shape, dtype=part.dtype, device=part.device)
        result[rows] = part
    assert result is not None, "weight_OK must have at least one row"
    return result
