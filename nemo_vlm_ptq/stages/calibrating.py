"""calibrate = observe + solve: statistics once, then scales for every format from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nemo_vlm_ptq import store
from nemo_vlm_ptq.calibrate.collect import observe_in_passes
from nemo_vlm_ptq.calibrate.observe import MODALITY_NAMES, Chunk, Observer
from nemo_vlm_ptq.calibrate.observe import observe as observe_model
from nemo_vlm_ptq.calibrate.scales import LinearScales, cut_scales
from nemo_vlm_ptq.calibrate.solve import load_scales, save_scales, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.statistics import load_layer
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.job import Job, Written, run_stage
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
        UserError: fewer questions than samples.
    """
    wanted = plan.recipe.calibration
    questions = load_questions(wanted.data, "calibration", wanted.samples, wanted.seed)
    items, size = questions.items, wanted.micro_batch
    if len(items) < wanted.samples:
        raise UserError(
            f"calibration.samples={wanted.samples} but {wanted.data} has only "
            f"{len(items)} questions"
        )
    ready = plan.family.preparer(plan.folder, plan.config)

    def prepare(chunk: Chunk) -> list[Sample]:
        samples = []
        for item in chunk:
            image = questions.image(item.image) if wanted.modality == "image_text" else None
            samples.append(ready(item.id, item.text + SUFFIX, image, item.answer))
        return samples

    return [items[i : i + size] for i in range(0, len(items), size)], prepare


def observe(job: Job) -> None:
    """Run the model over the calibration data and write workdir/statistics/."""
    plan, session, folder = job.plan, job.session, job.folder("statistics")
    megatron = job.folder("megatron")
    store.need_manifest(megatron, "import")
    before = store.read_manifest(folder)
    moments = any(fmt.second_moments for fmt in plan.formats)
    if before is not None:  # more statistics than asked for serve as well
        moments = moments or before["settings"]["moments"]
    wanted = plan.recipe.calibration
    settings = wanted.model_dump(exclude={"max_statistics_memory"}) | {
        "moments": moments,
        "input": store.hash_manifest(megatron),
    }

    def body() -> Written:
        model = build_decoder(plan.decoder, session, job.dtype)
        load_model(model, megatron)
        vision = plan.family.build_vision(plan.config, load_file(megatron / VISION))
        vision.to(session.device, job.dtype)
        chunks, prepare = calibration_chunks(plan)
        mine = deal(chunks, session.layout.data, session.data)

        def run(layers: Sequence[int]) -> Observer:
            return observe_model(model, vision, session, mine, prepare, layers, moments=moments)

        limit = wanted.max_statistics_memory if moments else 0
        files, seen = observe_in_passes(model, session, folder, limit, run)
        facts: dict[str, Any] = {"samples": wanted.samples}
        if session.tensor == 0 and session.pipeline == 0:
            facts["ids_per_rank"] = [[item.id for chunk in mine for item in chunk]]
            facts["tokens"] = {MODALITY_NAMES[key]: count for key, count in seen.tokens.items()}
        return Written(files, facts)

    run_stage(job, "observe", folder, settings, body)


def solve(job: Job) -> None:
    """Scales for every format of the recipe, and the quantized Megatron model made with them."""
    for fmt in job.plan.formats:
        _solve_format(job, fmt)
        _quantize_format(job, fmt)


def _solve_format(job: Job, fmt: QuantFormat) -> None:
    plan, folder = job.plan, job.folder(fmt.name, "scales")
    megatron, statistics = job.folder("megatron"), job.folder("statistics")
    store.need_manifest(megatron, "import")
    moments = store.need_manifest(statistics, "observe")["settings"]["moments"]
    if fmt.second_moments and not moments:
        raise UserError(
            f"{statistics} holds no second moments, which {fmt.name} needs; "
            "remove it and run observe with this format in quantize.format"
        )
    settings = {
        "format": fmt.name,
        "group_size": plan.recipe.quantize.group_size if fmt.granularity == "group" else None,
        "weights": store.hash_manifest(megatron),
        "statistics": store.hash_manifest(statistics),
    }

    def body() -> Written:
        files, layers = _solve_layers(job, fmt, folder)
        return Written(files, {"layers": layers})

    run_stage(job, f"solve {fmt.name}", folder, settings, body)


def _quantize_format(job: Job, fmt: QuantFormat) -> None:
    """An ordinary modelopt-quantized Megatron checkpoint: its quantizers, its state."""
    plan, session, folder = job.plan, job.session, job.folder(fmt.name, "quantized")
    settings = {"scales": store.hash_manifest(job.folder(fmt.name, "scales"))}

    def body() -> Written:
        from nemo_vlm_ptq.calibrate import quantizers  # modelopt takes seconds to import

        scales_of = own_scales(job, fmt)
        model = build_decoder(plan.decoder, session, job.dtype)
        load_model(model, job.folder("megatron"))
        quantizers.insert_quantizers(model, fmt, plan.recipe.quantize.group_size)
        quantizers.prepare_weights(model, fmt, scales_of)
        quantizers.fill_quantizers(model, fmt, scales_of)
        save_model(model, folder)
        quantizers.save_modelopt_state(model, folder)
        files = own_files(folder, session.rank)
        if session.rank == 0:
            state = sorted((folder / "modelopt_state").rglob("*"))
            files += [str(path.relative_to(folder)) for path in state if path.is_file()]
        return Written(files)

    run_stage(job, f"quantize {fmt.name}", folder, settings, body)


def _solve_layers(
    job: Job, fmt: QuantFormat, folder: Path
) -> tuple[list[str], list[dict[str, Any]]]:
    """Solve this rank's share of the layers; file names and a line per linear."""
    plan, session = job.plan, job.session
    reader = LayerReader(job.folder("megatron"))
    mine = deal(range(plan.decoder.layers), session.layout.world, session.rank)
    files, lines = [], []
    for layer in progress_bar(f"solve {fmt.name}", "layer", session.rank, mine):
        names = weight_names(layer)
        tensors = reader.read(names.values())
        weights = {linear: tensors[name].to(session.device) for linear, name in names.items()}
        seen = load_layer(job.folder("statistics"), layer, session.device)
        sizes = plan.decoder.sizes(VOCAB_MULTIPLE)
        group = plan.recipe.quantize.group_size
        scales = solve_layer(weights, seen, fmt, group, sizes)
        files.append(save_scales(folder, layer, scales))
        for linear, entry in scales.items():
            lines.append(
                {"layer": layer, "linear": linear, "error": entry.error, "alpha": entry.alpha}
            )
    return files, lines


def load_quantized(job: Job, fmt: QuantFormat, round_activations: bool = True) -> Any:
    """The quantized model of a finished solve, in this run's layout.

    Scales come from the layout-free files: modelopt's own restore of block scales is wrong when
    the tensor-parallel size has changed.
    """
    from nemo_vlm_ptq.calibrate import quantizers

    scales_of = own_scales(job, fmt)
    model = build_decoder(job.plan.decoder, job.session, job.dtype)
    quantizers.insert_quantizers(model, fmt, job.plan.recipe.quantize.group_size)
    quantizers.fill_quantizers(model, fmt, scales_of)
    load_model(model, job.folder(fmt.name, "quantized"))
    quantizers.fill_quantizers(model, fmt, scales_of)
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
