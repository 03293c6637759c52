"""evaluate: score the written checkpoints, and once the 16 bit source, on questions about images.

Every rank answers its share of the questions with the whole exported model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.constants import BASELINE
from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero, run_stage
from nemo_vlm_ptq.data.questions import Questions, evaluation_questions
from nemo_vlm_ptq.distributed.layout import split_evenly
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.evaluate import comparison, gqa, sight
from nemo_vlm_ptq.evaluate.answers import EvaluatedModel, generate_answers
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.planning.forecast import full_model_bytes
from nemo_vlm_ptq.stages.settings import source_identity
from nemo_vlm_ptq.targets.trtllm.engine.client import EngineClient
from nemo_vlm_ptq.targets.trtllm.engine.session import open_engine
from nemo_vlm_ptq.utils.progress import progress_bar
from nemo_vlm_ptq.verify.model_forms import fits_on_device, load_reference_model
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import check_folder, checked_file


def evaluate(context: RunContext) -> None:
    """Score the source and every format; the gate is checked when all are scored.

    Raises:
        VerificationError: a format lost more accuracy than the gate allows, or ignores images.
        UserError: the model does not fit on a GPU.
    """
    for fmt in (None, *context.plan.formats):
        name = BASELINE if fmt is None else fmt.name
        folder = context.folder(name, "evaluate")
        body = partial(_score, context, fmt, folder)
        run_stage(context, f"evaluate {name}", folder, _settings(context, fmt), body)
    _check_gates(context)


def read_result(folder: Path) -> dict[str, Any]:
    """Return gqa.json of a finished evaluation; empty if the stage has not run."""
    path = folder / "gqa.json"
    return store.read_json(checked_file(folder, path.name)) if path.is_file() else {}


def _settings(context: RunContext, fmt: QuantFormat | None) -> dict[str, Any]:
    """Return what the scores depend on."""
    plan = context.plan
    evaluate = plan.recipe.evaluate
    settings = evaluate.model_dump(exclude={"gate", "batch", "form"})
    if fmt is None:
        questions = evaluation_questions(evaluate.data, evaluate.limit).identity()
        return settings | {"source": source_identity(plan), "questions": questions}
    folder, stage = _scored_folder(context, fmt)
    store.require_manifest(folder, stage)
    return settings | {
        "target": _target(context, fmt),
        "input": store.hash_manifest(folder),
        "baseline": store.hash_manifest(context.folder(BASELINE, "evaluate")),
    }


def _target(context: RunContext, fmt: QuantFormat) -> str:
    """Return what is scored of a format: its engine, or the first of its exports."""
    engine = context.plan.recipe.evaluate.form == "engine"
    return "engine" if engine else context.plan.readable_targets(fmt)[0]


def _scored_folder(context: RunContext, fmt: QuantFormat) -> tuple[Path, str]:
    """Return the folder that is scored of a format, and the stage that writes it."""
    target = _target(context, fmt)
    if target == "engine":
        return context.folder(fmt.name, target), "build"
    return context.plan.export_folder(fmt, target), "export"


def _score(context: RunContext, fmt: QuantFormat | None, folder: Path) -> StageOutput:
    """Answer all questions, and again with swapped images for the sight test."""
    evaluate, name = context.plan.recipe.evaluate, BASELINE if fmt is None else fmt.name
    questions = evaluation_questions(evaluate.data, evaluate.limit)
    result: dict[str, Any] = {}
    swapped_answers: dict[str, str] = {}
    if fmt is not None:
        folder_read, stage = _scored_folder(context, fmt)
        on_rank_zero(context.parallel, partial(check_folder, folder_read, stage))
    with _open_model(context, fmt) as model:
        answers = _answer(context, model, questions, None, name)
        result["accuracy"] = asdict(gqa.score(questions, answers))
        if "sight" in evaluate.tasks:
            images = sight.swap_images(questions.items)
            swapped_answers = _answer(context, model, questions, images, f"{name} swapped")
            result["swapped"] = asdict(gqa.score(questions, swapped_answers))
    if context.parallel.rank != 0:
        return StageOutput()
    store.write_json(folder / "answers.json", {"own": answers, "swapped": swapped_answers})
    if fmt is not None:
        result |= _compare(context, questions, answers, result)
    store.write_json(folder / "gqa.json", result)
    return StageOutput(["answers.json", "gqa.json"])


@contextmanager
def _open_model(context: RunContext, fmt: QuantFormat | None) -> Iterator[EvaluatedModel]:
    """Open the export, or the source, in the reference model, in its own dtype.

    An engine runs in TensorRT-LLM with its own vision tower.
    """
    plan = context.plan
    form = "hf_source" if fmt is None else _target(context, fmt)
    tokenizer = load_tokenizer(plan.folder / plan.family.decoder_subfolder)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    preprocess = plan.family.make_preprocessor(plan.folder, plan.config)
    if form == "engine" and fmt is not None:
        with open_engine(context, fmt) as engine:
            yield EvaluatedModel(engine, preprocess, decode)
        return
    _require_memory(context)
    model = load_reference_model(context, form, fmt, context.dtype, context.parallel.device)
    yield EvaluatedModel(model, preprocess, decode, context.encoded_images)


def _require_memory(context: RunContext) -> None:
    """Check that the unsharded model fits on every rank.

    Raises:
        UserError: it does not; thousands of questions would take too long on the CPU.
    """
    if not all(context.parallel.all_gather(fits_on_device(context, context.dtype))):
        size = full_model_bytes(context.plan, context.dtype.itemsize) / 1e9
        raise UserError(
            f"evaluate needs the unsharded model on each GPU, {size:,.1f} GB in {context.dtype}, "
            "and it does not fit; run evaluate alone on GPUs with more memory"
        )


def _answer(
    context: RunContext,
    model: EvaluatedModel,
    questions: Questions,
    images: Mapping[str, tuple[str, ...]] | None,
    label: str,
) -> dict[str, str]:
    """Return the answers to all questions, on every rank."""
    parallel = context.parallel
    assigned = tuple(split_evenly(questions.items, parallel.layout.world_size, parallel.rank))
    if isinstance(model.backend, EngineClient):  # the engine has ranks of its own
        assigned = questions.items if parallel.rank == 0 else ()
    batch_size = context.plan.recipe.evaluate.batch
    with progress_bar(f"evaluate {label}", "question", parallel.rank, len(assigned)) as bar:

        def update(done: int, _: int) -> None:
            bar.update(done - bar.n)

        answers = generate_answers(
            model,
            replace(questions, items=assigned),
            images,
            batch_size=batch_size,
            progress=update,
        )
    gathered = {key: text for part in parallel.all_gather(answers) for key, text in part.items()}
    return {item.id: gathered[item.id] for item in questions.items}


def _compare(
    context: RunContext, questions: Questions, answers: dict[str, str], result: dict[str, Any]
) -> dict[str, Any]:
    """Return the paired comparison with the 16 bit model, and the result of the sight test."""
    folder = context.folder(BASELINE, "evaluate")
    baseline_answers = store.read_json(checked_file(folder, "answers.json"))["own"]
    before = gqa.match_answers(questions, baseline_answers)
    paired = asdict(comparison.compare(before, gqa.match_answers(questions, answers)))
    limit = context.plan.recipe.evaluate.gate.gqa_drop
    if limit is not None:
        passed = comparison.passes_gate(-paired["difference"], limit)
        paired["gate"] = {"limit": limit, "passed": passed}
    compared: dict[str, Any] = {"comparison": paired}
    if "swapped" in result:
        baseline = read_result(folder)
        accuracies = [
            scores[key]["accuracy"]
            for scores in (result, baseline)
            for key in ("accuracy", "swapped")
        ]
        compared["sees"] = sight.uses_images(*accuracies)
        compared["verdict"] = sight.verdict(*accuracies)
    return compared


def _check_gates(context: RunContext) -> None:
    """Check the sight test and the accuracy gate of every format.

    Raises:
        VerificationError: one failed.
    """
    limit = context.plan.recipe.evaluate.gate.gqa_drop
    for fmt in context.plan.formats:
        result = read_result(context.folder(fmt.name, "evaluate"))
        if result.get("sees") is False:
            raise VerificationError(f"evaluate {fmt.name}: {result['verdict']}")
        drop = -result["comparison"]["difference"]
        if not comparison.passes_gate(drop, limit):
            raise VerificationError(
                f"evaluate {fmt.name}: GQA fell by {drop:.2f} points, {limit} are allowed"
            )
