"""solve: scales for every format from statistics and weights, then the quantized Megatron model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, save_scales, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales, round_amax
from nemo_vlm_ptq.calibrate.statistics import InputStatistics, load_attention, load_layer
from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero, run_stage
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.planning.plan import VOCAB_MULTIPLE, Plan
from nemo_vlm_ptq.targets.megatron.quantized_checkpoint import write_quantized
from nemo_vlm_ptq.utils.device_prefetch import prefetch_to_device
from nemo_vlm_ptq.utils.pinned_memory import to_device
from nemo_vlm_ptq.utils.progress import progress_bar
from nemo_vlm_ptq.workdir import store

Solved = dict[str, list[tuple[int, dict[str, LinearScales]]]]  # format -> its layers on this rank


def solve(job: RunContext) -> None:
    """Scales for every format of the recipe, and the quantized Megatron model made with them.

    A layer's weights and statistics are read once for all formats that are not there yet.
    """
    plan, parallel = job.plan, job.parallel
    settings = {fmt.name: solve_inputs(job.plan, job.workdir, fmt) for fmt in plan.formats}

    def is_done(fmt: QuantFormat) -> bool:
        return store.is_done(job.folder(fmt.name, "scales"), settings[fmt.name])

    done = on_rank_zero(parallel, lambda: [is_done(fmt) for fmt in plan.formats])
    left = [fmt for fmt, finished in zip(plan.formats, done, strict=True) if not finished]
    together = functools.cache(lambda: _solve_all(job, left))  # by the first stage that asks
    for fmt in plan.formats:
        _solve_format(job, fmt, settings[fmt.name], together)
        write_quantized(job, fmt)


def solve_inputs(plan: Plan, work: Path, fmt: QuantFormat) -> dict[str, Any]:
    """What the scales of a format depend on.

    Raises:
        UserError: a stage before has not finished, or observed less than the format needs.
    """
    megatron, statistics = work / "megatron", work / "statistics"
    store.require_manifest(megatron, "import")
    moments = store.require_manifest(statistics, "observe")["settings"]["moments"]
    if plan.needs_second_moments(fmt) and not moments:
        raise UserError(
            f"{statistics} holds no second moments, which {fmt.name} needs; "
            "remove it and run observe with this format in quantize.format"
        )
    return _solve_settings(plan, fmt) | {
        "weights": store.hash_manifest(megatron),
        "statistics": store.hash_manifest(statistics),
    }


def _solve_format(
    job: RunContext, fmt: QuantFormat, settings: dict[str, Any], together: Callable[[], Solved]
) -> None:
    """A format's scales into files, layer by layer."""
    folder, statistics = job.folder(fmt.name, "scales"), job.folder("statistics")

    def body() -> StageOutput:
        solved = together()
        files, lines = [], []
        for layer, scales in solved[fmt.name]:
            kv = None
            if job.plan.recipe.quantize.kv_cache != "none":
                key, value = load_attention(statistics, layer)
                kv = round_amax(key, job.dtype), round_amax(value, job.dtype)
            files.append(save_scales(folder, layer, scales, kv))
            lines += [
                {"layer": layer, "linear": linear, **one.metrics()}
                for linear, one in scales.items()
            ]
        return StageOutput(files, {"layers": lines, "solved_with": sorted(solved)})

    run_stage(job, f"solve {fmt.name}", folder, settings, body)


def _solve_settings(plan: Plan, fmt: QuantFormat) -> dict[str, Any]:
    """What of the recipe changes the scales of a format, and nothing else."""
    wanted = plan.recipe.quantize
    sized = fmt.granularity == "group" and fmt.block is None
    smooth, searched = fmt.algorithm == "smoothquant", plan.needs_second_moments(fmt)
    return {
        "format": fmt.name,
        "group_size": wanted.group_size if sized else None,
        "kv_cache": None if wanted.kv_cache == "none" else wanted.kv_cache,
        "smoothquant_alpha": wanted.smoothquant_alpha if smooth else None,
        "image_share": wanted.image_share if searched else None,
    }


def _solve_all(job: RunContext, formats: Sequence[QuantFormat]) -> Solved:
    """Some formats for this rank's share of the layers: what observe made, or from files."""
    held = [len(job.solved_scales.get(fmt.name, ())) for fmt in formats]
    counts = job.parallel.gather(held)
    if all(sum(layers) == job.plan.decoder.layers for layers in zip(*counts, strict=True)):
        return {fmt.name: job.solved_scales[fmt.name] for fmt in formats}
    job.solved_scales.clear()
    return _solve_from_files(job, formats)


def layer_solver(
    job: RunContext, formats: Sequence[QuantFormat]
) -> Callable[[int, Mapping[str, torch.Tensor], Mapping[str, InputStatistics]], None]:
    """What solves a layer (index, weights by linear, statistics by linear) into job.solved."""
    wanted, sizes = job.plan.recipe.quantize, job.plan.decoder.sizes(VOCAB_MULTIPLE)
    wishes = SolveOptions(wanted.smoothquant_alpha, wanted.image_share)
    rows = job.plan.family.parameter_map

    def solve_one(
        layer: int, weights: Mapping[str, torch.Tensor], seen: Mapping[str, InputStatistics]
    ) -> None:
        seen = {
            name: one.with_output_power(weights[name]) for name, one in seen.items()
        }  # once for all
        for fmt in formats:
            given = (weights, seen, fmt, wanted.group_size, sizes, wishes, rows)
            scales = {linear: one.to_cpu() for linear, one in solve_layer(*given).items()}
            job.solved_scales.setdefault(fmt.name, []).append((layer, scales))

    return solve_one


def _solve_from_files(job: RunContext, formats: Sequence[QuantFormat]) -> Solved:
    """Weights and statistics are read a layer ahead; layers are dealt over all ranks."""
    parallel, statistics = job.parallel, job.folder("statistics")
    reader, solve_one = LayerReader(job.folder("megatron")), layer_solver(job, formats)

    def read(layer: int) -> tuple[dict[str, Any], dict[str, InputStatistics]]:
        names = weight_names(layer)
        tensors = reader.read(names.values())
        weights = {
            linear: to_device(tensors[name], parallel.device) for linear, name in names.items()
        }
        return weights, load_layer(statistics, layer, parallel.device)

    mine = round_robin(range(job.plan.decoder.layers), parallel.layout.world, parallel.rank)
    label = f"solve {', '.join(fmt.name for fmt in formats)}"
    with progress_bar(label, "layer", parallel.rank, len(mine)) as bar:
        for layer, (weights, seen) in prefetch_to_device(mine, read, parallel.device):
            solve_one(layer, weights, seen)
            bar.update()
    return {fmt.name: job.solved_scales.get(fmt.name, []) for fmt in formats}
