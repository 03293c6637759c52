"""observe: run the model over the calibration data and write workdir/statistics/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.observe.loop import MicroBatch, ObserveOptions, ObserveSetup
from nemo_vlm_ptq.calibrate.observe.loop import observe as observe_model
from nemo_vlm_ptq.calibrate.observe.observer import MODALITY_NAMES
from nemo_vlm_ptq.calibrate.observe.reduction import LayerConsumer
from nemo_vlm_ptq.calibrate.statistics import LINEARS, assemble_layer, load_token_counts
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, Question, calibration_questions
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_model
from nemo_vlm_ptq.megatron.parallel_context import cores_per_rank
from nemo_vlm_ptq.planning.forecast import working_bytes
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.stages.solve import layer_solver
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.files import VISION_FILE

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
    calibration, max_positions = plan.recipe.calibration, plan.decoder.max_positions
    questions = calibration_questions(calibration)
    make_sample = plan.family.make_preprocessor(plan.folder, plan.config)
    threads = ThreadPoolExecutor(min(MAX_IMAGE_THREADS, cores_per_rank()))

    def preprocess_question(item: Question, encodes_image: bool) -> Sample:
        image: Any = None
        if item.image:
            # where the number of image tokens depends on the image, every rank needs it
            needed = encodes_image or plan.family.tokens_per_image is None
            image = questions.load_image(item.image) if needed else EMPTY_IMAGE
        sample = make_sample(item.id, item.text + PROMPT_SUFFIX, image, item.answer)
        if len(sample.input_ids) > max_positions:
            raise UserError(
                f"question {item.id!r} of {calibration.data} has {len(sample.input_ids)} tokens, "
                f"image included, and the model has {max_positions} positions; shorten or remove it"
            )
        return sample

    def preprocess(micro_batch: MicroBatch, encodes_images: bool) -> list[Sample]:
        return list(threads.map(preprocess_question, micro_batch, repeat(encodes_images)))

    items, size = questions.items, calibration.micro_batch
    return [items[i : i + size] for i in range(0, len(items), size)], preprocess


def observe_settings(plan: Plan, work: Path) -> dict[str, Any]:
    """Return what the statistics depend on."""
    before = store.read_manifest(work / "statistics")
    second_moments = plan.second_moments
    if before is not None:  # statistics with second moments also serve formats without
        second_moments = second_moments or before["settings"]["moments"]
    calibration = plan.recipe.calibration
    return calibration.model_dump(exclude={"max_statistics_memory", "save_every"}) | {
        "moments": second_moments,
        "questions": calibration_questions(calibration).identity(),
        "input": store.hash_manifest(work / "megatron"),
    }


def observe(context: RunContext) -> None:
    """Run the model over the calibration data and write workdir/statistics/."""
    plan, parallel, folder = context.plan, context.parallel, context.folder("statistics")
    store.require_manifest(context.folder("megatron"), "import")
    calibration, settings = plan.recipe.calibration, observe_settings(plan, context.workdir)

    def body() -> StageOutput:
        model = build_decoder(plan.decoder, parallel, context.dtype, for_calibration=True)
        load_model(model, context.folder("megatron"))
        options = ObserveOptions(
            second_moments=settings["moments"],
            max_memory=calibration.max_statistics_memory,
            reserved_memory=working_bytes(plan, parallel.layout.tensor),
            save_every=calibration.save_every,
        )
        if "solve" in context.stages and parallel.layout.tensor == 1:
            options = replace(options, consume=_layer_consumer(context, model))
        tensors = load_file(context.folder("megatron", VISION_FILE))
        vision = plan.family.build_vision(plan.config, tensors, parallel.device, context.dtype)
        micro_batches, preprocess = calibration_micro_batches(plan)
        setup = ObserveSetup(model=model, vision=vision, parallel=parallel, preprocess=preprocess)
        result = observe_model(setup, micro_batches, folder, options, settings)
        tokens = dict(zip(MODALITY_NAMES.values(), load_token_counts(folder, 0), strict=True))
        _check_modalities(tokens, calibration.modality)
        facts: dict[str, Any] = {"samples": calibration.samples, "passes": len(result.passes)}
        if parallel.tensor_rank == 0 and parallel.pipeline_rank == 0:
            facts["ids_per_rank"] = result.passes[:1]
        if parallel.rank == 0:
            facts["tokens"] = tokens
        return StageOutput(result.files, facts, result.sha256)

    run_stage(context, "observe", folder, settings, body)


def _layer_consumer(context: RunContext, model: Any) -> LayerConsumer:
    """Return a function that solves a layer for all formats while its statistics are written.

    Used when solve follows and ranks hold whole weights: nothing has to be read again.
    """
    blocks = {block.layer_number - 1: block for block in model.decoder.layers}
    solve_layer = layer_solver(context, context.plan.formats)

    def consume(layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        block = blocks[layer]
        weights = {name: block.get_submodule(path).weight.data for name, path in LINEARS.items()}
        solve_layer(layer, weights, assemble_layer(dict(tensors)))

    return consume


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
