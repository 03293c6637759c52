"""Windows of layers: how many layers a rank takes at a time. Arithmetic of sizes alone.

A rank holds the weights of a window and, while it computes, those of the next. Statistics of one
window are summed at a time. With a single window nothing is held twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_vlm_ptq.distributed.layout import split_evenly
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning.forecast import (
    layer_statistics_bytes,
    layer_weight_bytes,
    resident_bytes,
    sample_tokens,
    working_bytes,
)
from nemo_vlm_ptq.planning.plan import Plan

EXPORTED_COPIES = 3  # of a layer's weights: read, prepared and encoded by the thread that exports
MEMORY_FRACTION = 0.9  # of a device's free memory that observe plans with


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """Windows of a pipeline stage, and the memory of a rank in bytes.

    size: most layers of a window.
    count: windows per stage.
    device_bytes: peak of weights, statistics and activations, without hidden states.
    states_bytes: hidden states of all micro-batches of a rank between windows; 0 for one window.
    states_on_device: bytes of them that stay on the device; the others go to the host or a file.
    exports_early: whether there is room to export layers while later windows compute.
    """

    size: int
    count: int
    device_bytes: int
    states_bytes: int
    states_on_device: int
    exports_early: bool = False


def stage_windows(layers: int, pipeline: int, stage: int, size: int, first: int = 0) -> list[range]:
    """Return the windows of a pipeline stage: as few as hold at most `size` layers, evenly filled.

    Every stage has the same number.

    Args:
        layers: number of layers of the model, a multiple of `pipeline`.
        pipeline: number of stages.
        stage: index of the stage.
        size: largest window.
        first: fewest layers of the first window, which may be more than `size`.
    """
    own = split_evenly(range(layers), pipeline, stage)
    head, rest = (own[:first], own[first:]) if first > size else (own[:0], own)
    count = -(-len(rest) // size)
    parts = [split_evenly(rest, count, index) for index in range(count)]
    return [range(part[0], part[-1] + 1) for part in (head, *parts) if len(part)]


def window_bytes(plan: Plan, tensor: int, pipeline: int, size: int) -> int:
    """Return the peak memory of a rank that takes `size` layers at a time, in bytes."""
    weights = layer_weight_bytes(plan, tensor)
    held = 1 if size == plan.decoder.layers // pipeline else 2  # the next window is read meanwhile
    layers = max(size, plan.decoder.deepstack_layers)
    layers *= held * weights + layer_statistics_bytes(plan, tensor)
    return resident_bytes(plan, tensor) + working_bytes(plan, tensor) + layers


def fitting_window(plan: Plan, tensor: int, pipeline: int, memory: int) -> int:
    """Return the most layers that a rank with `memory` bytes can take at a time; 0 if none."""
    own, usable = plan.decoder.layers // pipeline, MEMORY_FRACTION * memory
    if window_bytes(plan, tensor, pipeline, own) <= usable:
        return own
    sizes = range(own - 1, 0, -1)
    return next((n for n in sizes if window_bytes(plan, tensor, pipeline, n) <= usable), 0)


def plan_windows(plan: Plan, tensor: int, pipeline: int, data: int, memory: int) -> WindowPlan:
    """Return the windows of a rank with `memory` bytes.

    Raises:
        UserError: the recipe's window, or a single layer, needs more memory.
    """
    own, requested = plan.decoder.layers // pipeline, plan.recipe.calibration.window
    fitting = fitting_window(plan, tensor, pipeline, memory)
    size = fitting if requested == "auto" else requested
    if not size or size > fitting:
        raise UserError(_too_large(plan, tensor, pipeline, memory, max(1, size), fitting))
    windows = stage_windows(own, 1, 0, size, plan.decoder.deepstack_layers)
    count, size = len(windows), len(windows[-1])
    need = window_bytes(plan, tensor, pipeline, size)
    samples = -(-plan.recipe.calibration.samples // data)
    width = 4 if plan.dtype == "float32" else 2
    states = samples * sample_tokens(plan) * plan.decoder.hidden * width if count > 1 else 0
    room = max(0, int(MEMORY_FRACTION * memory) - need)
    exported = EXPORTED_COPIES * layer_weight_bytes(plan, 1)
    return WindowPlan(
        size=size,
        count=count,
        device_bytes=need,
        states_bytes=states,
        states_on_device=min(states, room) if count > 1 else 0,
        exports_early=count > 1 and min(states, room) + exported <= room,
    )


def _too_large(plan: Plan, tensor: int, pipeline: int, memory: int, size: int, fitting: int) -> str:
    need = window_bytes(plan, tensor, pipeline, size) / 1e9
    usable = f"{MEMORY_FRACTION:.0%} of a rank's memory is {MEMORY_FRACTION * memory / 1e9:,.1f} GB"
    if fitting:
        return (
            f"calibration.window={size} needs {need:,.1f} GB, but {usable}; use at most {fitting}"
        )
    batch = plan.recipe.calibration.micro_batch
    smaller = f"calibration.micro_batch below {batch}, " if batch > 1 else ""
    return f"a window of one layer needs {need:,.1f} GB, but {usable}; use {smaller}a larger " \
        "parallel.tensor or GPUs with more memory"  # fmt: skip


def layers_in_memory(plan: Plan, tensor: int, pipeline: int, memory: int) -> int:
    """Return how many layers' weights a memory holds, at least one, at most a stage."""
    own = plan.decoder.layers // pipeline
    return max(1, min(own, math.floor(memory / layer_weight_bytes(plan, tensor))))
