"""observe: run the model over the calibration data, and solve its layers as they are finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.observe.hidden_states import host_room
from nemo_vlm_ptq.calibrate.observe.loop import observe as observe_model
from nemo_vlm_ptq.calibrate.observe.observer import MODALITY_NAMES
from nemo_vlm_ptq.calibrate.observe.records import MicroBatch, ObserveOptions, ObserveSetup
from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero, run_stage
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, Question, calibration_questions
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source
from nemo_vlm_ptq.megatron.parallel_context import cores_per_rank, free_memory, local_world_size
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.planning.preflight import check_length
from nemo_vlm_ptq.planning.windows import WindowPlan, plan_windows, stage_windows
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision
from nemo_vlm_ptq.stages.export import start_exports
from nemo_vlm_ptq.stages.layer_solver import LayerSolver, unsolved_formats
from nemo_vlm_ptq.stages.settings import observation, observed_settings, solve_settings
from nemo_vlm_ptq.workdir import store

MAX_IMAGE_THREADS = 8  # threads that preprocess images
EMPTY_IMAGE = ImageInputs(torch.empty(0))  # in place of an image that another rank encodes


def calibration_micro_batches(
    plan: Plan,
) -> tuple[list[MicroBatch], Callable[[MicroBatch, bool], list[Sample]]]:
    """Return the recipe's questions as micro-batches, and the function that preprocesses one.

    The function takes a micro-batch and whether this rank encodes its images.

    Raises:
        UserError: fewer questions than samples, or questions without an image; when samples are
            preprocessed, one that is longer than the model's maximum.
    """
    calibration = plan.recipe.calibration
    questions = calibration_questions(calibration)
    make_sample = plan.family.make_preprocessor(plan.folder, plan.config)
    threads = ThreadPoolExecutor(min(MAX_IMAGE_THREADS, cores_per_rank()))

    def preprocess_question(item: Question, encodes_images: bool) -> Sample:
        # where the number of image tokens depends on the image, every rank needs it
        needed = encodes_images or plan.family.tokens_per_image is None
        images = questions.load_images(item) if needed else [EMPTY_IMAGE] * len(item.images)
        text, most = item.text + PROMPT_SUFFIX, calibration.max_pixels
        sample = make_sample(item.id, text, images, item.answer, max_pixels=most)
        check_length(plan, sample, questions.name)
        return sample

    def preprocess(micro_batch: MicroBatch, encodes_images: bool) -> list[Sample]:
        return list(threads.map(preprocess_question, micro_batch, repeat(encodes_images)))

    items, size = questions.items, calibration.micro_batch
    return [items[i : i + size] for i in range(0, len(items), size)], preprocess


def observe(context: RunContext) -> None:
    """Run the model over the calibration data; solve its layers if solve follows.

    Statistics are written to workdir/statistics/ if the recipe keeps them, or if nothing else of
    the run would remain.
    """
    plan, folder = context.plan, context.folder("statistics")
    formats = unsolved_formats(context) if "solve" in context.stages else []
    asked = plan.recipe.calibration.keep_statistics or "solve" not in context.stages

    def find_settings() -> dict[str, Any]:
        before = observed_settings(plan, folder)
        keep = asked or (before is not None and before["kept"])
        if before is not None and _suffices(plan, before, keep, formats):
            return before
        if before is not None:  # of the same values, but they do not lie there
            store.discard_stage(folder)
        moments = {*plan.moments, *(before["moments"] if before is not None and keep else ())}
        solved = {fmt.name: solve_settings(plan, context.workdir, fmt) for fmt in formats}
        return observation(plan) | {"moments": sorted(moments), "kept": keep, "solved": solved}

    settings = on_rank_zero(context.parallel, find_settings)
    run_stage(
        context, "observe", folder, settings, lambda: _observe(context, folder, settings, formats)
    )


def _suffices(
    plan: Plan, before: Mapping[str, Any], keep: bool, formats: Sequence[QuantFormat]
) -> bool:
    """Return whether an observation has what is asked for now."""
    if not before["kept"]:
        return not keep and not formats
    return set(plan.moments) <= set(before["moments"])


def _observe(
    context: RunContext,
    folder: Path,
    settings: Mapping[str, Any],
    formats: Sequence[QuantFormat],
) -> StageOutput:
    plan, parallel = context.plan, context.parallel
    layout, calibration = parallel.layout, plan.recipe.calibration
    if parallel.rank == 0:
        for path in folder.glob("hidden_states.*"):  # of a run that was killed
            path.unlink()
    memory = min(parallel.all_gather(free_memory(parallel.device)))
    windows = plan_windows(plan, layout.tensor, layout.pipeline, layout.data, memory)
    host_bytes = _host_states_bytes(context, windows)
    micro_batches, preprocess = calibration_micro_batches(plan)
    with open_weights(plan, parallel.device) as weights:
        solver = LayerSolver(context, formats, weights) if formats else None

        def build_window(window: range) -> Any:
            model = build_decoder(
                plan.decoder, parallel, context.dtype, window=window, for_calibration=True
            )
            load_from_source(model, parallel, weights, for_calibration=True)
            return model

        def build_vision() -> Any:
            tensors = read_vision(plan)
            return plan.family.build_vision(plan.config, tensors, parallel.device, context.dtype)

        setup = ObserveSetup(
            parallel=parallel,
            windows=stage_windows(
                plan.decoder.layers,
                layout.pipeline,
                parallel.pipeline_rank,
                windows.size,
                plan.decoder.deepstack_layers,
            ),
            build_window=build_window,
            feature_width=plan.decoder.feature_width,
            build_vision=build_vision,
            preprocess=preprocess,
        )
        options = ObserveOptions(
            moments=settings["moments"],
            keep=settings["kept"],
            device_states_bytes=windows.states_on_device,
            host_states_bytes=host_bytes,
            save_every=calibration.save_every,
        )
        if solver is not None:
            commit = _commit_and_export(context, solver, windows)
            options = replace(options, consume=solver.consume, commit=commit)
        result = observe_model(setup, micro_batches, folder, options, settings)
    tokens = dict(zip(MODALITY_NAMES.values(), result.tokens, strict=True))
    _check_modalities(tokens, calibration.modality)
    facts: dict[str, Any] = {"samples": calibration.samples, "windows": windows.count}
    if parallel.tensor_rank == 0 and parallel.pipeline_rank == 0:
        facts["ids_per_rank"] = [result.sample_ids]
    if parallel.rank == 0:
        facts["tokens"] = tokens
    return StageOutput(result.files, facts, result.sha256)


def _commit_and_export(
    context: RunContext, solver: LayerSolver, windows: WindowPlan
) -> Callable[[], None]:
    """Return what follows a window: its layers are recorded, and files that they fill started.

    With one window, little memory, or formats that were solved before, export waits for its stage.
    """
    exports = "export" in context.stages and windows.exports_early
    exports = exports and solver.formats == context.plan.formats
    files = start_exports(context) if exports else None

    def commit() -> None:
        solver.commit()
        if files is not None:
            files.advance(solver.solved)

    return commit


def _host_states_bytes(context: RunContext, windows: WindowPlan) -> int:
    """Return the host memory that hidden states may take; the rest of them goes to a file.

    Raises:
        UserError: the disk has no room for that rest.
    """
    ranks, device = local_world_size(), context.parallel.device
    host = host_room(device, ranks)
    in_file = ranks * (windows.states_bytes - windows.states_on_device - host)
    free = shutil.disk_usage(context.workdir).free
    if in_file > free:
        raise UserError(
            f"hidden states between windows take {windows.states_bytes / 1e9:,.1f} GB per rank, of "
            f"which {in_file / 1e9:,.1f} GB do not fit in memory, and {context.workdir} has "
            f"{free / 1e9:,.1f} GB; use a workdir with more room, fewer calibration.samples, or "
            "more data ranks on other machines"
        )
    return host


def _check_modalities(tokens: Mapping[str, int], modality: str) -> None:
    """Check that the calibration data had tokens of every modality that the recipe names.

    Raises:
        UserError: a modality had none.
    """
    for name in MODALITY_NAMES.values():
        if name in modality.split("_") and not tokens[name]:
            raise UserError(
                f"calibration.modality={modality}, but the calibration data has no {name} tokens: "
                f"{dict(tokens)}"
            )
