"""observe: the model runs once over the calibration data and leaves workdir/statistics/."""

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
from nemo_vlm_ptq.calibrate.statistics import LINEARS, assemble_layer, load_tokens
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, Question, calibration_questions
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_model
from nemo_vlm_ptq.megatron.parallel_context import cores_per_rank
from nemo_vlm_ptq.planning.forecast import working_bytes
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.stages.import_model import VISION_FILE
from nemo_vlm_ptq.stages.solve import layer_solver
from nemo_vlm_ptq.workdir import store

IMAGE_THREADS = 8  # threads that prepare images, at most
PLACEHOLDER_IMAGE = ImageInputs(torch.empty(0))  # of an image that another rank looks at


def calibration_micro_batches(
    plan: Plan,
) -> tuple[list[MicroBatch], Callable[[MicroBatch, bool], list[Sample]]]:
    """The recipe's questions as micro-batches, and what makes samples of one (`Work.prepare`).

    Raises:
        UserError: fewer questions than samples, questions without an image, or, when samples are
            made, one that is longer than the model reads.
    """
    wanted, most = plan.recipe.calibration, plan.decoder.max_positions
    questions = calibration_questions(wanted)
    ready = plan.family.make_preprocessor(plan.folder, plan.config)
    threads = ThreadPoolExecutor(min(IMAGE_THREADS, cores_per_rank()))

    def sample(item: Question, looks: bool) -> Sample:
        image: Any = None
        if item.image:
            needed = looks or plan.family.tokens_per_image is None  # its size tells its tokens
            image = questions.image(item.image) if needed else PLACEHOLDER_IMAGE
        made = ready(item.id, item.text + PROMPT_SUFFIX, image, item.answer)
        if len(made.input_ids) > most:
            raise UserError(
                f"question {item.id!r} of {wanted.data} takes {len(made.input_ids)} tokens, image "
                f"included, and the model has {most} positions; shorten it or leave it out"
            )
        return made

    items, size = questions.items, wanted.micro_batch
    chunks: list[MicroBatch] = [items[i : i + size] for i in range(0, len(items), size)]
    return chunks, lambda chunk, looks: list(threads.map(sample, chunk, repeat(looks)))


def observe_settings(plan: Plan, work: Path) -> dict[str, Any]:
    """What the statistics depend on."""
    before = store.read_manifest(work / "statistics")
    moments = plan.second_moments
    if before is not None:  # more statistics than asked for serve as well
        moments = moments or before["settings"]["moments"]
    wanted = plan.recipe.calibration
    return wanted.model_dump(exclude={"max_statistics_memory", "save_every"}) | {
        "moments": moments,
        "questions": calibration_questions(wanted).identity(),
        "input": store.hash_manifest(work / "megatron"),
    }


def observe(job: RunContext) -> None:
    """Run the model over the calibration data and write workdir/statistics/."""
    plan, parallel, folder = job.plan, job.parallel, job.folder("statistics")
    megatron = job.folder("megatron")
    store.require_manifest(megatron, "import")
    wanted, settings = plan.recipe.calibration, observe_settings(plan, job.workdir)
    moments = settings["moments"]

    def body() -> StageOutput:
        model = build_decoder(plan.decoder, parallel, job.dtype, to_observe=True)
        load_model(model, megatron)
        memory, working = wanted.max_statistics_memory, working_bytes(plan, parallel.layout.tensor)
        limits = ObserveOptions(moments, memory, working, wanted.save_every)
        if "solve" in job.stages and parallel.layout.tensor == 1:
            limits = replace(limits, consume=_solver_beside(job, model))
        beside = load_file(megatron / VISION_FILE)
        vision = plan.family.build_vision(plan.config, beside, parallel.device, job.dtype)
        chunks, prepare = calibration_micro_batches(plan)
        run = observe_model(
            ObserveSetup(model, vision, parallel, prepare), chunks, folder, limits, settings
        )
        tokens = dict(zip(MODALITY_NAMES.values(), load_tokens(folder, 0), strict=True))
        _check_modalities(tokens, wanted.modality)
        facts: dict[str, Any] = {"samples": wanted.samples, "passes": len(run.passes)}
        if parallel.tensor == 0 and parallel.pipeline == 0:
            facts["ids_per_rank"] = run.passes[:1]
        if parallel.rank == 0:
            facts["tokens"] = tokens
        return StageOutput(run.files, facts, run.sha256)

    run_stage(job, "observe", folder, settings, body)


def _solver_beside(job: RunContext, model: Any) -> LayerConsumer:
    """What solves each layer for the recipe's formats while its statistics are written.

    For when solve comes next and ranks have whole weights: nothing is read again then.
    """
    blocks = {block.layer_number - 1: block for block in model.decoder.layers}
    solve_one = layer_solver(job, job.plan.formats)

    def consume(layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        block = blocks[layer]
        weights = {name: block.get_submodule(path).weight.data for name, path in LINEARS.items()}
        solve_one(layer, weights, assemble_layer(dict(tensors)))

    return consume


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
