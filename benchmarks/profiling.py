"""Profile the kernels of a function with torch.profiler."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

REPORTED_KERNELS = 12  # longest kernels of a profile


def profile(function: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Profile a function.

    Returns:
        wall: wall time in seconds.
        total: seconds of all kernels and copies; of operations on a CPU.
        kernels: (name, calls, seconds) of the longest.
    """
    from torch.profiler import ProfilerActivity

    is_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    start = time.perf_counter()
    with torch.profiler.profile(activities=[activity]) as profiler:
        function()
        if is_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    kernels = [
        (
            event.key,
            event.count,
            (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1e6,
        )
        for event in profiler.key_averages()
        if not is_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels.sort(key=lambda kernel: -kernel[2])
    total = sum(kernel[2] for kernel in kernels)
    return {"wall": wall, "total": total, "kernels": kernels[:REPORTED_KERNELS]}
