"""solve: compute the scales of every format, then write the quantized Megatron checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, save_scales, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales, round_amax
from nemo_vlm_ptq.calibrate.statistics import InputStatistics, load_layer, load_observed_kv_amax
from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero, run_stage
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.targets.megatron.quantized_checkpoint import write_quantized
from nemo_vlm_ptq.utils.pinned_memory import to_device
from nemo_vlm_ptq.utils.prefetch import prefetch_to_device
from nemo_vlm_ptq.utils.progress import progress_bar
from nemo_vlm_ptq.workdir import store

Solved = dict[str, list[tuple[int, dict[str, LinearScales]]]]  # format -> layers of this rank
LayerSolver = Callable[[int, Mapping[str, torch.Tensor], Mapping[str, InputStatistics]], None]


def solve(context: RunContext) -> None:
    """Solve the scales of every format and write the quantized Megatron checkpoints.

    Weights and statistics of a layer are read once for all formats that are not finished.
    """
    plan = context.plan
    settings = {fmt.name: solve_inputs(plan, context.workdir, fmt) for fmt in plan.formats}

    def unfinished() -> list[bool]:
        folders = {fmt.name: context.folder(fmt.name, "scales") for fmt in plan.formats}
        return [not store.is_finished(folders[name], settings[name]) for name in folders]

    selected = on_rank_zero(context.parallel, unfinished)
    remaining = [fmt for fmt, chosen in zip(plan.formats, selected, strict=True) if chosen]
    solve_remaining = functools.cache(lambda: _solve_all(context, remaining))
    for fmt in plan.formats:
        _write_scales(context, fmt, settings[fmt.name], solve_remaining)
        write_quantized(context, fmt)


def solve_inputs(plan: Plan, work: Path, fmt: QuantFormat) -> dict[str, Any]:
    """Return what the scales of a format depend on.

    Raises:
        UserError: an earlier stage has not finished, or observed less than the format needs.
    """
    megatron, statistics = work / "megatron", work / "statistics"
    store.require_manifest(megatron, "import")
    second_moments = store.require_manifest(statistics, "observe")["settings"]["moments"]
    if plan.needs_second_moments(fmt) and not second_moments:
        raise UserError(
            f"{statistics} has no second moments, which {fmt.name} needs; remove the folder and "
            "run observe with this format in quantize.format"
        )
    return _solve_settings(plan, fmt) | {
        "weights": store.hash_manifest(megatron),
        "statistics": store.hash_manifest(statistics),
    }


def layer_solver(context: RunContext, formats: Sequence[QuantFormat]) -> LayerSolver:
    """Return a function that solves a layer into context.solved_scales.

    Its arguments are the layer's index, linear -> weight, and linear -> statistics.
    """
    quantize = context.plan.recipe.quantize
    sizes = context.plan.decoder.sizes(VOCAB_MULTIPLE)
    options = SolveOptions(
        smoothquant_alpha=quantize.smoothquant_alpha, image_share=quantize.image_share
    )
    parameter_map = context.plan.family.parameter_map

    def solve_into(
        layer: int,
        weights: Mapping[str, torch.Tensor],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        statistics = {  # computed once for all formats
            name: linear.with_output_power(weights[name]) for name, linear in statistics.items()
        }
        for fmt in formats:
            scales = solve_layer(
                weights, statistics, fmt, quantize.group_size, sizes, options, parameter_map
            )
            on_cpu = {name: linear.to_cpu() for name, linear in scales.items()}
            context.solved_scales.setdefault(fmt.name, []).append((layer, on_cpu))

    return solve_into


def _write_scales(
    context: RunContext,
    fmt: QuantFormat,
    settings: dict[str, Any],
    solve_remaining: Callable[[], Solved],
) -> None:
    """Write the scales of a format layer by layer."""
    folder, statistics = context.folder(fmt.name, "scales"), context.folder("statistics")

    def body() -> StageOutput:
        solved = solve_remaining()
        files, entries = [], []
        for layer, scales in solved[fmt.name]:
            kv = None
            if context.plan.recipe.quantize.kv_cache != "none":
                key, value = load_observed_kv_amax(statistics, layer)
                kv = round_amax(key, context.dtype), round_amax(value, context.dtype)
            files.append(save_scales(folder, layer, scales, kv))
            entries += [
                {"layer": layer, "linear": name, **linear.metrics()}
                for name, linear in scales.items()
            ]
        return StageOutput(files, {"layers": entries, "solved_with": sorted(solved)})

    run_stage(context, f"solve {fmt.name}", folder, settings, body)


def _solve_settings(plan: Plan, fmt: QuantFormat) -> dict[str, Any]:
    """Return the recipe keys that change the scales of a format."""
    quantize = plan.recipe.quantize
    has_groups = fmt.granularity == "group" and fmt.block is None
    smoothquant, searched = fmt.algorithm == "smoothquant", plan.needs_second_moments(fmt)
    return {
        "format": fmt.name,
        "group_size": quantize.group_size if has_groups else None,
        "kv_cache": None if quantize.kv_cache == "none" else quantize.kv_cache,
        "smoothquant_alpha": quantize.smoothquant_alpha if smoothquant else None,
        "image_share": quantize.image_share if searched else None,
    }


def _solve_all(context: RunContext, formats: Sequence[QuantFormat]) -> Solved:
    """Return the scales of this rank's layers: solved by observe, or solved now from files."""
    counts = [len(context.solved_scales.get(fmt.name, ())) for fmt in formats]
    per_format = zip(*context.parallel.all_gather(counts), strict=True)
    if all(sum(layers) == context.plan.decoder.layers for layers in per_format):
        return {fmt.name: context.solved_scales[fmt.name] for fmt in formats}
    context.solved_scales.clear()
    return _solve_from_files(context, formats)


def _solve_from_files(context: RunContext, formats: Sequence[QuantFormat]) -> Solved:
    """Solve this rank's layers, assigned round-robin over all ranks, with prefetching."""
    parallel, statistics_folder = context.parallel, context.folder("statistics")
    reader, solve_into = LayerReader(context.folder("megatron")), layer_solver(context, formats)

    def read(layer: int) -> tuple[dict[str, Any], dict[str, InputStatistics]]:
        names = weight_names(layer)
        tensors = reader.read(names.values())
        weights = {
            linear: to_device(tensors[name], parallel.device) for linear, name in names.items()
        }
        return weights, load_layer(statistics_folder, layer, parallel.device)

    layers = range(context.plan.decoder.layers)
    assigned = round_robin(layers, parallel.layout.world_size, parallel.rank)
    label = f"solve {', '.join(fmt.name for fmt in formats)}"
    with progress_bar(label, "layer", parallel.rank, len(assigned)) as bar:
        for layer, (weights, statistics) in prefetch_to_device(assigned, read, parallel.device):
            solve_into(layer, weights, statistics)
            bar.update()
    return {fmt.name: context.solved_scales.get(fmt.name, []) for fmt in formats}
