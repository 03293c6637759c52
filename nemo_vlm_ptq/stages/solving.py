"""solve: scales for every format from statistics and weights, then the quantized Megatron model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq import store
from nemo_vlm_ptq.calibrate.ahead import read_ahead
from nemo_vlm_ptq.calibrate.scales import LinearScales, stored
from nemo_vlm_ptq.calibrate.solve import Wishes, save_scales, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.statistics import InputStatistics, load_attention, load_layer
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.job import Job, Written, on_first_rank, run_stage
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.page_locked import moved
from nemo_vlm_ptq.parallel import deal
from nemo_vlm_ptq.plan import VOCAB_MULTIPLE, Plan
from nemo_vlm_ptq.progress import progress_bar
from nemo_vlm_ptq.stages.quantizing import quantize_format

Solved = dict[str, list[tuple[int, dict[str, LinearScales]]]]  # format -> its layers on this rank


def solve(job: Job) -> None:
    """Scales for every format of the recipe, and the quantized Megatron model made with them.

    A layer's weights and statistics are read once for all formats that are not there yet.
    """
    plan, session = job.plan, job.session
    settings = {fmt.name: solve_inputs(job.plan, job.work, fmt) for fmt in plan.formats}

    def is_done(fmt: QuantFormat) -> bool:
        return store.is_done(job.folder(fmt.name, "scales"), settings[fmt.name])

    done = on_first_rank(session, lambda: [is_done(fmt) for fmt in plan.formats])
    left = [fmt for fmt, finished in zip(plan.formats, done, strict=True) if not finished]
    together = functools.cache(lambda: _solve_all(job, left))  # by the first stage that asks
    for fmt in plan.formats:
        _solve_format(job, fmt, settings[fmt.name], together)
        quantize_format(job, fmt)


def solve_inputs(plan: Plan, work: Path, fmt: QuantFormat) -> dict[str, Any]:
    """What the scales of a format depend on.

    Raises:
        UserError: a stage before has not finished, or observed less than the format needs.
    """
    megatron, statistics = work / "megatron", work / "statistics"
    store.need_manifest(megatron, "import")
    moments = store.need_manifest(statistics, "observe")["settings"]["moments"]
    if plan.needs_moments(fmt) and not moments:
        raise UserError(
            f"{statistics} holds no second moments, which {fmt.name} needs; "
            "remove it and run observe with this format in quantize.format"
        )
    return _solve_settings(plan, fmt) | {
        "weights": store.hash_manifest(megatron),
        "statistics": store.hash_manifest(statistics),
    }


def _solve_format(
    job: Job, fmt: QuantFormat, settings: dict[str, Any], together: Callable[[], Solved]
) -> None:
    """A format's scales into files, layer by layer."""
    folder, statistics = job.folder(fmt.name, "scales"), job.folder("statistics")

    def body() -> Written:
        solved = together()
        files, lines = [], []
        for layer, scales in solved[fmt.name]:
            kv = None
            if job.plan.recipe.quantize.kv_cache != "none":
                key, value = load_attention(statistics, layer)
                kv = stored(key, job.dtype), stored(value, job.dtype)
            files.append(save_scales(folder, layer, scales, kv))
            lines += [
                {"layer": layer, "linear": linear, **one.facts()} for linear, one in scales.items()
            ]
        return Written(files, {"layers": lines, "solved_with": sorted(solved)})

    run_stage(job, f"solve {fmt.name}", folder, settings, body)


def _solve_settings(plan: Plan, fmt: QuantFormat) -> dict[str, Any]:
    """What of the recipe changes the scales of a format, and nothing else."""
    wanted = plan.recipe.quantize
    sized = fmt.granularity == "group" and fmt.block is None
    smooth, searched = fmt.algorithm == "smoothquant", plan.needs_moments(fmt)
    return {
        "format": fmt.name,
        "group_size": wanted.group_size if sized else None,
        "kv_cache": None if wanted.kv_cache == "none" else wanted.kv_cache,
        "smoothquant_alpha": wanted.smoothquant_alpha if smooth else None,
        "image_share": wanted.image_share if searched else None,
    }


def _solve_all(job: Job, formats: Sequence[QuantFormat]) -> Solved:
    """Some formats for this rank's share of the layers: what observe made, or from files."""
    held = [len(job.solved.get(fmt.name, ())) for fmt in formats]
    counts = job.session.gather(held)
    if all(sum(layers) == job.plan.decoder.layers for layers in zip(*counts, strict=True)):
        return {fmt.name: job.solved[fmt.name] for fmt in formats}
    job.solved.clear()
    return _solve_from_files(job, formats)


def layer_solver(
    job: Job, formats: Sequence[QuantFormat]
) -> Callable[[int, Mapping[str, torch.Tensor], Mapping[str, InputStatistics]], None]:
    """What solves a layer (index, weights by linear, statistics by linear) into job.solved."""
    wanted, sizes = job.plan.recipe.quantize, job.plan.decoder.sizes(VOCAB_MULTIPLE)
    wishes = Wishes(wanted.smoothquant_alpha, wanted.image_share)
    rows = job.plan.family.rows

    def solve_one(
        layer: int, weights: Mapping[str, torch.Tensor], seen: Mapping[str, InputStatistics]
    ) -> None:
        seen = {name: one.with_power(weights[name]) for name, one in seen.items()}  # once for all
        for fmt in formats:
            given = (weights, seen, fmt, wanted.group_size, sizes, wishes, rows)
            scales = {linear: one.on_host() for linear, one in solve_layer(*given).items()}
            job.solved.setdefault(fmt.name, []).append((layer, scales))

    return solve_one


def _solve_from_files(job: Job, formats: Sequence[QuantFormat]) -> Solved:
    """Weights and statistics are read a layer ahead; layers are dealt over all ranks."""
    session, statistics = job.session, job.folder("statistics")
    reader, solve_one = LayerReader(job.folder("megatron")), layer_solver(job, formats)

    def read(layer: int) -> tuple[dict[str, Any], dict[str, InputStatistics]]:
        names = weight_names(layer)
        tensors = reader.read(names.values())
        weights = {linear: moved(tensors[name], session.device) for linear, name in names.items()}
        return weights, load_layer(statistics, layer, session.device)

    mine = deal(range(job.plan.decoder.layers), session.layout.world, session.rank)
    label = f"solve {', '.join(fmt.name for fmt in formats)}"
    with progress_bar(label, "layer", session.rank, len(mine)) as bar:
        for layer, (weights, seen) in read_ahead(mine, read, session.device):
            solve_one(layer, weights, seen)
            bar.update()
    return {fmt.name: job.solved.get(fmt.name, []) for fmt in formats}
