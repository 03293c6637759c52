"""Choice of the layout that `auto` stands for: the fastest for observe whose ranks fit in a GPU.

Data-parallel ranks need no communication, and with windows of layers they hold any model of which
two layers fit; they are preferred. Tensor parallelism is used if a layer does not fit otherwise, or
if there are more ranks than micro-batches. Pipeline stages wait for each other unless a single
window holds a stage. The choice depends on shapes and the machine only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_vlm_ptq.constants import BASELINE
from nemo_vlm_ptq.distributed.layout import divisors
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning.constraints import calibration_tensor_sizes
from nemo_vlm_ptq.planning.forecast import bytes_per_parameter, full_model_bytes
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.planning.windows import MEMORY_FRACTION, fitting_window, window_bytes
from nemo_vlm_ptq.recipe import Parallel
from nemo_vlm_ptq.workdir.store import MANIFEST

# Hidden size at which a tensor rank spends as long on communication as on computation.
BREAK_EVEN_HIDDEN = 1800


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The ranks that run, or can be started with one GPU each.

    ranks: number of ranks.
    ranks_per_node: ranks on one host.
    gpu_memory: bytes of the smallest GPU's memory per rank; None without GPUs.
    started: the ranks run already, so that a layout must use all of them.
    """

    ranks: int
    ranks_per_node: int
    gpu_memory: int | None
    started: bool = False


def resolve_layout(plan: Plan, detect: Callable[[], Machine]) -> tuple[Plan, str]:
    """Replace `auto` tensor and pipeline sizes of a plan by numbers.

    Args:
        plan: the plan. An `auto` data size takes the remaining ranks; it stays `auto` without a
            GPU.
        detect: returns the machine; called only if a size is `auto`.

    Returns:
        the plan and the reason for the layout, empty if nothing was `auto`.

    Raises:
        UserError: no layout on this machine holds the model.
    """
    if "auto" not in (plan.recipe.parallel.tensor, plan.recipe.parallel.pipeline):
        return plan, ""
    parallel, reason = choose_layout(plan, detect())
    recipe = plan.recipe.model_copy(update={"parallel": parallel})
    return replace(plan, recipe=recipe), reason


def check_evaluate_memory(
    plan: Plan, stages: Collection[str], detect: Callable[[], Machine]
) -> None:
    """Check that the model fits on one GPU if `evaluate` has yet to run it.

    Args:
        plan: the plan.
        stages: stages that are to run.
        detect: returns the machine; called only if `evaluate` has to run a model.

    Raises:
        UserError: the model does not fit; the message lists the stages that can run.
    """
    if "evaluate" not in stages or plan.recipe.evaluate.form == "engine":
        return
    work, names = Path(plan.recipe.workdir), [BASELINE, *(fmt.name for fmt in plan.formats)]
    if all((work / name / "evaluate" / MANIFEST).is_file() for name in names):
        return
    memory, need = detect().gpu_memory, full_model_bytes(plan, bytes_per_parameter(plan))
    if memory is not None and need > MEMORY_FRACTION * memory:
        others = [stage for stage in stages if stage != "evaluate"]
        first = f"set stages=[{','.join(others)}], and " if others else ""
        raise UserError(
            f"evaluate needs the unsharded model on each GPU, {need / 1e9:,.1f} GB in "
            f"{plan.dtype}, but {_usable_memory(memory)}; {first}run evaluate on GPUs with more "
            "memory"
        )


def _usable_memory(memory: int) -> str:
    return f"{MEMORY_FRACTION:.0%} of a GPU is {MEMORY_FRACTION * memory / 1e9:,.1f} GB"


def choose_layout(plan: Plan, machine: Machine) -> tuple[Parallel, str]:
    """Return the fitting layout with the least work, and the reason for it.

    Among equals the first of `_candidates` is chosen.

    Raises:
        UserError: no layout fits; the message says what the smallest one needs.
    """
    requested = plan.recipe.parallel
    if machine.gpu_memory is None:
        sizes = {key: 1 for key in ("tensor", "pipeline") if getattr(requested, key) == "auto"}
        return requested.model_copy(update=sizes), "no GPU"
    candidates = list(_candidates(plan, machine))
    size = 1 if plan.recipe.calibration.window == "auto" else plan.recipe.calibration.window
    needs = {(t, p): window_bytes(plan, t, p, size) for t, p in candidates}
    usable = MEMORY_FRACTION * machine.gpu_memory
    fitting = [layout for layout in candidates if needs[layout] <= usable]
    if not fitting:
        raise UserError(_no_layout_message(requested, machine, needs))
    tensor, pipeline = min(fitting, key=lambda layout: _work(plan, machine, *layout))
    data = _data_size(requested, machine, tensor, pipeline)
    window = _window(plan, machine, tensor, pipeline)
    need = window_bytes(plan, tensor, pipeline, window)
    reason = f"needs {need / 1e9:,.1f} of {machine.gpu_memory / 1e9:,.1f} GB"
    return Parallel(tensor=tensor, pipeline=pipeline, data=data), reason


def _window(plan: Plan, machine: Machine, tensor: int, pipeline: int) -> int:
    """Return the layers that a rank of a fitting layout takes at a time."""
    assert machine.gpu_memory is not None
    requested = plan.recipe.calibration.window
    if requested != "auto":
        return requested
    return fitting_window(plan, tensor, pipeline, machine.gpu_memory)


def _data_size(requested: Parallel, machine: Machine, tensor: int, pipeline: int) -> int:
    """Return the data-parallel size of a layout."""
    if requested.data == "auto":
        return machine.ranks // (tensor * pipeline)
    return requested.data


def _work(plan: Plan, machine: Machine, tensor: int, pipeline: int) -> float:
    """Return the time of observe, in units of a micro-batch on one rank with all layers."""
    requested, calibration = plan.recipe.parallel, plan.recipe.calibration
    data = _data_size(requested, machine, tensor, pipeline)
    micro_batches = math.ceil(calibration.samples / (calibration.micro_batch * data))
    share = (1 + (tensor - 1) * BREAK_EVEN_HIDDEN / plan.decoder.hidden) / tensor
    layers = plan.decoder.layers // pipeline
    windows = math.ceil(layers / _window(plan, machine, tensor, pipeline))
    rounds = pipeline * (windows - 1) + 1
    fill = pipeline - 1  # micro-batches until the last stage works
    return share * rounds * (micro_batches + fill) / (pipeline * windows)


def _candidates(plan: Plan, machine: Machine) -> Iterator[tuple[int, int]]:
    """Yield the (tensor, pipeline) sizes that model and ranks allow, in order of preference."""
    requested, layers = plan.recipe.parallel, plan.decoder.layers
    pipelines = divisors(layers) if requested.pipeline == "auto" else [requested.pipeline]
    tensors = calibration_tensor_sizes(plan) if requested.tensor == "auto" else [requested.tensor]
    for pipeline in pipelines:
        for tensor in tensors:
            if _uses_ranks(requested, machine, tensor, pipeline):
                yield tensor, pipeline


def _uses_ranks(requested: Parallel, machine: Machine, tensor: int, pipeline: int) -> bool:
    """Return whether there are enough ranks, and no started rank stays unused.

    Tensor ranks that were started must share a host.
    """
    replicas, unused = divmod(machine.ranks, tensor * pipeline)
    data = max(1, replicas) if requested.data == "auto" else requested.data
    if not machine.started:
        return data <= replicas
    return data == replicas and not unused and machine.ranks_per_node % tensor == 0


def _no_layout_message(
    requested: Parallel, machine: Machine, needs: Mapping[tuple[int, int], int]
) -> str:
    if not needs:
        return (
            f"parallel: no supported tensor size fills {machine.ranks} ranks with pipeline "
            f"{requested.pipeline} x data {requested.data}; start another number of ranks"
        )
    smallest = min(needs, key=lambda layout: needs[layout])
    tensor, pipeline = smallest
    assert machine.gpu_memory is not None
    pipeline_auto = "" if requested.pipeline == "auto" else "parallel.pipeline=auto, "
    return (
        f"no layout of {machine.ranks} ranks fits: TP {tensor} x PP {pipeline} needs "
        f"{needs[smallest] / 1e9:,.1f} GB per rank in observe, but "
        f"{_usable_memory(machine.gpu_memory)}; use {pipeline_auto}a smaller "
        f"calibration.micro_batch or more GPUs, or set parallel.tensor={tensor} to run anyway"
    )


def detect_machine() -> Machine:
    """Return the GPUs of this host, or, on a rank, the GPUs of the ranks that run."""
    import torch

    gpus = torch.cuda.device_count()
    memory = None
    if gpus:
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
    world_size = os.environ.get("WORLD_SIZE")
    if world_size is None:
        ranks = max(1, gpus)
        return Machine(ranks=ranks, ranks_per_node=ranks, gpu_memory=memory)
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if memory is not None:
        memory //= -(-ranks_per_node // gpus)  # ranks may share a GPU
    return Machine(
        ranks=int(world_size), ranks_per_node=ranks_per_node, gpu_memory=memory, started=True
    )
