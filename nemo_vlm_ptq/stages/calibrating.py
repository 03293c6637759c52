"""calibrate = observe + solve: statistics once, then scales for every format from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq import store
from nemo_vlm_ptq.calibrate.ahead import read_ahead
from nemo_vlm_ptq.calibrate.observe import Chunk, Limits, Work
from nemo_vlm_ptq.calibrate.observe import observe as observe_model
from nemo_vlm_ptq.calibrate.observer import MODALITY_NAMES
from nemo_vlm_ptq.calibrate.scales import LinearScales, cut_scales, stored
from nemo_vlm_ptq.calibrate.solve import (
    Wishes,
    load_kv,
    load_scales,
    save_scales,
    solve_layer,
    weight_names,
)
from nemo_vlm_ptq.calibrate.statistics import (
    InputStatistics,
    load_attention,
    load_layer,
    load_tokens,
)
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.job import Job, Written, on_first_rank, run_stage
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import LayerReader, load_model, save_model
from nemo_vlm_ptq.parallel import deal
from nemo_vlm_ptq.plan import VOCAB_MULTIPLE, Plan
from nemo_vlm_ptq.progress import progress_bar
from nemo_vlm_ptq.questions import SUFFIX, load_questions
from nemo_vlm_ptq.stages.importing import VISION, own_files


def calibration_chunks(plan: Plan) -> tuple[list[Chunk], Callable[[Chunk], list[Sample]]]:
    """The recipe's questions as micro-batches, and what makes samples of one.

    Raises:
        UserError: fewer questions than samples, or questions without an image.
    """
    wanted = plan.recipe.calibration
    questions = load_questions(wanted.data, "calibration", wanted.samples, wanted.seed)
    items, size = questions.items, wanted.micro_batch
    if len(items) < wanted.samples:
        raise UserError(
            f"calibration.samples={wanted.samples} but {wanted.data} has only "
            f"{len(items)} questions"
        )
    looks = wanted.modality == "image_text"
    blind = [item.id for item in items if looks and not item.image]
    if blind:
        raise UserError(
            f"calibration.modality=image_text, but {len(blind)} of {len(items)} questions of "
            f"{wanted.data} have no imageId, first {blind[0]!r}; a model calibrated without images "
            "may lose them: add images, or set calibration.modality=text"
        )
    ready = plan.family.preparer(plan.folder, plan.config)

    def prepare(chunk: Chunk) -> list[Sample]:
        samples = []
        for item in chunk:
            image = questions.image(item.image) if looks else None
            samples.append(ready(item.id, item.text + SUFFIX, image, item.answer))
        return samples

    return [items[i : i + size] for i in range(0, len(items), size)], prepare


def observe(job: Job) -> None:
    """Run the model over the calibration data and write workdir/statistics/."""
    plan, session, folder = job.plan, job.session, job.folder("statistics")
    megatron = job.folder("megatron")
    store.need_manifest(megatron, "import")
    before = store.read_manifest(folder)
    moments = plan.second_moments
    if before is not None:  # more statistics than asked for serve as well
        moments = moments or before["settings"]["moments"]
    wanted = plan.recipe.calibration
    settings = wanted.model_dump(exclude={"max_statistics_memory", "save_every"}) | {
        "moments": moments,
        "input": store.hash_manifest(megatron),
    }
    limits = Limits(moments, wanted.max_statistics_memory, wanted.save_every)

    def body() -> Written:
        model = build_decoder(plan.decoder, session, job.dtype)
        load_model(model, megatron)
        vision = plan.family.build_vision(plan.config, load_file(megatron / VISION))
        vision.to(session.device, job.dtype)
        chunks, prepare = calibration_chunks(plan)
        run = observe_model(Work(model, vision, session, prepare), chunks, folder, limits, settings)
        tokens = dict(zip(MODALITY_NAMES.values(), load_tokens(folder, 0), strict=True))
        _check_modalities(tokens, wanted.modality)
        facts: dict[str, Any] = {"samples": wanted.samples, "passes": len(run.passes)}
        if session.tensor == 0 and session.pipeline == 0:
            facts["ids_per_rank"] = run.passes[:1]
        if session.rank == 0:
            facts["tokens"] = tokens
        return Written(run.files, facts)

    run_stage(job, "observe", folder, settings, body)


def _check_modalities(tokens: Mapping[str, int], modality: str) -> None:
    """Every kind of token that the recipe asked for has come.

    Raises:
        UserError: a kind never came.
    """
    for kind in MODALITY_NAMES.values():
        if kind in modality.split("_") and not tokens[kind]:
            raise UserError(
                f"calibration.modality={modality}, but the calibration data brought no {kind} "
                f"tokens: {dict(tokens)}"
            )


Solved = dict[str, list[tuple[int, dict[str, LinearScales]]]]  # format -> its layers on this rank


def solve(job: Job) -> None:
    """Scales for every format of the recipe, and the quantized Megatron model made with them.

    A layer's weights and statistics are read once for all formats that are not there yet.
    """
    plan, session = job.plan, job.session
    settings = {fmt.name: _solve_inputs(job, fmt) for fmt in plan.formats}

    def is_done(fmt: QuantFormat) -> bool:
        return store.is_done(job.folder(fmt.name, "scales"), settings[fmt.name])

    done = on_first_rank(session, lambda: [is_done(fmt) for fmt in plan.formats])
    left = [fmt for fmt, finished in zip(plan.formats, done, strict=True) if not finished]
    together = functools.cache(lambda: _solve_layers(job, left))  # by the first stage that asks
    for fmt in plan.formats:
        _solve_format(job, fmt, settings[fmt.name], together)
        _quantize_format(job, fmt)


def _solve_inputs(job: Job, fmt: QuantFormat) -> dict[str, Any]:
    """What the scales of a format depend on.

    Raises:
        UserError: a stage before has not finished, or observed less than the format needs.
    """
    plan, statistics = job.plan, job.folder("statistics")
    store.need_manifest(job.folder("megatron"), "import")
    moments = store.need_manifest(statistics, "observe")["settings"]["moments"]
    if plan.needs_moments(fmt) and not moments:
        raise UserError(
            f"{statistics} holds no second moments, which {fmt.name} needs; "
            "remove it and run observe with this format in quantize.format"
        )
    return _solve_settings(plan, fmt) | {
        "weights": store.hash_manifest(job.folder("megatron")),
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


def _quantize_format(job: Job, fmt: QuantFormat) -> None:
    """An ordinary modelopt-quantized Megatron checkpoint: its quantizers, its state."""
    plan, session, folder = job.plan, job.session, job.folder(fmt.name, "quantized")
    chosen = plan.recipe.quantize
    settings = {
        "scales": store.hash_manifest(job.folder(fmt.name, "scales")),
        "kv_cache": chosen.kv_cache,
    }

    def body() -> Written:
        from nemo_vlm_ptq.calibrate import quantizers  # modelopt takes seconds to import

        scales_of, kv_of = own_scales(job, fmt), own_kv(job, fmt)
        model = build_decoder(plan.decoder, session, job.dtype)
        load_model(model, job.folder("megatron"))
        quantizers.insert_quantizers(model, fmt, chosen.group_size, KV_CACHES.get(chosen.kv_cache))
        quantizers.prepare_weights(model, fmt, scales_of)
        quantizers.fill_quantizers(model, fmt, scales_of, kv_of)
        save_model(model, folder)
        quantizers.save_modelopt_state(model, folder)
        files = own_files(folder, session.rank)
        if session.rank == 0:
            state = sorted((folder / "modelopt_state").rglob("*"))
            files += [str(path.relative_to(folder)) for path in state if path.is_file()]
        return Written(files)

    run_stage(job, f"quantize {fmt.name}", folder, settings, body)


def _solve_layers(job: Job, formats: Sequence[QuantFormat]) -> Solved:
    """Solve this rank's share of the layers for some formats."""
    plan, session, statistics = job.plan, job.session, job.folder("statistics")
    reader, wanted = LayerReader(job.folder("megatron")), plan.recipe.quantize
    sizes, rows = plan.decoder.sizes(VOCAB_MULTIPLE), plan.family.rows
    wishes = Wishes(wanted.smoothquant_alpha, wanted.image_share)

    def read(layer: int) -> tuple[dict[str, Any], dict[str, InputStatistics]]:
        names = weight_names(layer)
        tensors = reader.read(names.values())
        weights = {linear: tensors[name].to(session.device) for linear, name in names.items()}
        return weights, load_layer(statistics, layer, session.device)

    mine = deal(range(plan.decoder.layers), session.layout.world, session.rank)
    solved: Solved = {fmt.name: [] for fmt in formats}
    label = f"solve {', '.join(solved)}"
    with progress_bar(label, "layer", session.rank, len(mine)) as bar:
        for layer, (weights, seen) in read_ahead(mine, read, session.device):
            for fmt in formats:
                given = (weights, seen, fmt, wanted.group_size, sizes, wishes, rows)
                scales = solve_layer(*given)
                solved[fmt.name].append((layer, {k: one.on_host() for k, one in scales.items()}))
            bar.update()
    return solved


def load_quantized(job: Job, fmt: QuantFormat, round_activations: bool = True) -> Any:
    """The quantized model of a finished solve, in this run's layout.

    Scales come from the layout-free files: modelopt's own restore of block scales is wrong when
    the tensor-parallel size has changed.
    """
    from nemo_vlm_ptq.calibrate import quantizers

    scales_of, kv_of = own_scales(job, fmt), own_kv(job, fmt)
    chosen = job.plan.recipe.quantize
    model = build_decoder(job.plan.decoder, job.session, job.dtype)
    quantizers.insert_quantizers(model, fmt, chosen.group_size, KV_CACHES.get(chosen.kv_cache))
    quantizers.fill_quantizers(model, fmt, scales_of, kv_of)
    load_model(model, job.folder(fmt.name, "quantized"))
    quantizers.fill_quantizers(model, fmt, scales_of, kv_of)
    quantizers.use_own_rounding(model, fmt)
    if not round_activations:
        quantizers.stop_rounding_activations(model)
    return model


def own_scales(job: Job, fmt: QuantFormat) -> Callable[[int, str], LinearScales]:
    """(layer, linear) -> solved scales cut to this rank's shard."""
    session, folder = job.session, job.folder(fmt.name, "scales")
    layers: dict[int, dict[str, LinearScales]] = {}

    def scales_of(layer: int, linear: str) -> LinearScales:
        if layer not in layers:
            layers[layer] = load_scales(folder, layer)
        return cut_scales(layers[layer][linear], linear, session.tensor, session.layout.tensor)

    return scales_of


def own_kv(job: Job, fmt: QuantFormat) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None:
    """layer -> largest |key| and |value| []; None if the KV cache stays in 16 bit."""
    if job.plan.recipe.quantize.kv_cache == "none":
        return None
    return lambda layer: load_kv(job.folder(fmt.name, "scales"), layer)
