"""The layout that `auto` stands for: the one that observes fastest of those whose rank fits a GPU.

Data parallel ranks need no word between them, so they come first; tensor and pipeline ranks where
the model does not fit otherwise, or where second moments would take so many passes over the data
that what these ranks send and wait is less. Chosen once, from shapes and the machine alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_vlm_ptq.constants import BASELINE
from nemo_vlm_ptq.distributed.layout import divisors
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning.forecast import (
    count_passes,
    dtype_bytes,
    full_model_bytes,
    observe_bytes,
)
from nemo_vlm_ptq.planning.plan import Plan, calibration_tensor_sizes
from nemo_vlm_ptq.recipe import Parallel
from nemo_vlm_ptq.workdir.store import MANIFEST

MEMORY_FRACTION = 0.9  # of a GPU's memory that a rank may take
BREAK_EVEN_HIDDEN = (
    1800  # hidden size at which tensor ranks send a token for as long as one computes it
)


@dataclass(frozen=True)
class Machine:
    """Where ranks run.

    ranks: how many run, or can be started with a GPU each; node: of them on one host; memory:
    bytes of a GPU that a rank has at least, None without GPUs; started: they run already, and all
    must be used.
    """

    ranks: int
    node: int
    memory: int | None
    started: bool = False


def resolve_layout(plan: Plan, machine: Callable[[], Machine]) -> tuple[Plan, str]:
    """The plan with numbers for `auto`, and why these; the machine is asked for only then.

    Data parallel stays as it is: `auto` there is what is left of the ranks.

    Raises:
        UserError: no layout on this machine holds the model.
    """
    if "auto" not in (plan.recipe.parallel.tensor, plan.recipe.parallel.pipeline):
        return plan, ""
    parallel, why = choose_layout(plan, machine())
    recipe = plan.recipe.model_copy(update={"parallel": parallel})
    return replace(plan, recipe=recipe), why


def check_evaluate_memory(
    plan: Plan, stages: Collection[str], machine: Callable[[], Machine]
) -> None:
    """A GPU has room for the model that `evaluate` asks, where it has yet to ask.

    Raises:
        UserError: it has not; says which stages can run.
    """
    if "evaluate" not in stages or plan.recipe.evaluate.form == "engine":
        return
    work, asked = Path(plan.recipe.workdir), [BASELINE, *(fmt.name for fmt in plan.formats)]
    if all((work / name / "evaluate" / MANIFEST).is_file() for name in asked):
        return
    memory, need = machine().memory, full_model_bytes(plan, dtype_bytes(plan))
    if memory is not None and need > MEMORY_FRACTION * memory:
        others = [stage for stage in stages if stage != "evaluate"]
        first = f"set stages=[{','.join(others)}], and " if others else ""
        raise UserError(
            f"evaluate asks a model that is whole on each GPU, {need / 1e9:,.1f} GB in "
            f"{plan.dtype}, and {MEMORY_FRACTION:.0%} of a GPU here are {MEMORY_FRACTION * memory / 1e9:,.1f} GB; "
            f"{first}run evaluate where GPUs have more memory"
        )


def choose_layout(plan: Plan, machine: Machine) -> tuple[Parallel, str]:
    """Of the layouts that fit the one of least work; of equals the first of `_candidates`.

    Raises:
        UserError: none fits; says what a rank of the best one needs.
    """
    wanted = plan.recipe.parallel
    if machine.memory is None:
        alone = {key: 1 for key in ("tensor", "pipeline") if getattr(wanted, key) == "auto"}
        return wanted.model_copy(update=alone), "there is no GPU"
    candidates = list(_candidates(plan, machine))
    needs = {(t, p): observe_bytes(plan, t, p) for t, p in candidates}
    fitting = [one for one in candidates if needs[one] <= MEMORY_FRACTION * machine.memory]
    if not fitting:
        raise UserError(_refusal(wanted, machine, needs))
    runs = {(t, p): count_passes(plan, t, p, machine.memory) for t, p in fitting}
    tensor, pipeline = min(fitting, key=lambda one: _work(plan, machine, *one) * runs[one])
    data = _replicas(wanted, machine, tensor, pipeline)
    why = f"fits in {needs[tensor, pipeline] / 1e9:,.1f} of {machine.memory / 1e9:,.1f} GB"
    if (count := runs[tensor, pipeline]) > 1:
        why += f"; second moments take {count} passes over the data"
    return Parallel(tensor=tensor, pipeline=pipeline, data=data), why


def _replicas(wanted: Parallel, machine: Machine, tensor: int, pipeline: int) -> int:
    """Data ranks of a layout."""
    return machine.ranks // (tensor * pipeline) if wanted.data == "auto" else wanted.data


def _work(plan: Plan, machine: Machine, tensor: int, pipeline: int) -> float:
    """Time that the data takes once, in that of a micro-batch on one rank that has all layers."""
    wanted, calibration = plan.recipe.parallel, plan.recipe.calibration
    data = _replicas(wanted, machine, tensor, pipeline)
    batches = calibration.samples / (calibration.micro_batch * data)
    share = (1 + (tensor - 1) * BREAK_EVEN_HIDDEN / plan.decoder.hidden) / tensor
    return share * (batches + pipeline - 1) / pipeline  # stages wait for the first one's output


def _candidates(plan: Plan, machine: Machine) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) that the model and the ranks allow, in the order of preference."""
    wanted, layers = plan.recipe.parallel, plan.decoder.layers
    stages = divisors(layers) if wanted.pipeline == "auto" else [wanted.pipeline]
    sizes = calibration_tensor_sizes(plan) if wanted.tensor == "auto" else [wanted.tensor]
    for pipeline in stages:
        for tensor in sizes:
            if _makes_up(wanted, machine, tensor, pipeline):
                yield tensor, pipeline


def _makes_up(wanted: Parallel, machine: Machine, tensor: int, pipeline: int) -> bool:
    """There are ranks for the layout, and none that must be left out."""
    replicas, left = divmod(machine.ranks, tensor * pipeline)
    data = max(1, replicas) if wanted.data == "auto" else wanted.data
    if not machine.started:
        return data <= replicas
    return data == replicas and not left and machine.node % tensor == 0


def _refusal(wanted: Parallel, machine: Machine, needs: Mapping[tuple[int, int], int]) -> str:
    if not needs:
        return (
            f"parallel: no tensor size that works makes up {machine.ranks} ranks with pipeline "
            f"{wanted.pipeline} x data {wanted.data}; change their number"
        )
    tensor, pipeline = min(needs, key=lambda layout: needs[layout])
    assert machine.memory is not None
    more = "" if wanted.pipeline == "auto" else "parallel.pipeline=auto, "
    return (
        f"no layout of {machine.ranks} ranks fits: at TP {tensor} x PP {pipeline} one takes "
        f"{needs[tensor, pipeline] / 1e9:,.1f} GB in observe, and {MEMORY_FRACTION:.0%} of its GPU are "
        f"{MEMORY_FRACTION * machine.memory / 1e9:,.1f} GB; use {more}a smaller calibration.micro_batch or "
        f"more GPUs, or set parallel.tensor={tensor} to try"
    )


def detect_machine() -> Machine:
    """The GPUs of this host, or, on a rank, what the ranks that run have."""
    import torch

    gpus = torch.cuda.device_count()
    memory = None
    if gpus:
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
    world = os.environ.get("WORLD_SIZE")
    if world is None:
        return Machine(max(1, gpus), max(1, gpus), memory)
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if memory is not None:
        memory //= -(-node // gpus)  # ranks may share a GPU
    return Machine(int(world), node, memory, started=True)
