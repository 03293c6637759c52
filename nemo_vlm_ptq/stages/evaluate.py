"""evaluate: questions answered from the written checkpoint, and from the 16 bit source once.

Every rank answers its share of the questions with the whole exported model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.constants import BASELINE
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.data.questions import Questions, evaluation_questions
from nemo_vlm_ptq.distributed.layout import split_evenly
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.evaluate import comparison as compare
from nemo_vlm_ptq.evaluate import gqa, sight
from nemo_vlm_ptq.evaluate.answers import AnsweringModel, answer_all
from nemo_vlm_ptq.families.shared import load_tokenizer
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.planning.forecast import full_model_bytes
from nemo_vlm_ptq.stages.import_model import source_identity
from nemo_vlm_ptq.stages.model_forms import fits_on_device, load_reference_model
from nemo_vlm_ptq.targets.trtllm.engine.runtime import EngineRuntime
from nemo_vlm_ptq.targets.trtllm.engine.session import open_engine
from nemo_vlm_ptq.utils.progress import progress_bar
from nemo_vlm_ptq.workdir import store


def evaluate(job: RunContext) -> None:
    """Score the source and every format; the gate is checked when all are scored.

    Raises:
        ProofError: a format lost more than the gate allows, or no longer looks at the image.
        UserError: no room for the model on a GPU.
    """
    _evaluate_form(job, None)
    for fmt in job.plan.formats:
        _evaluate_form(job, fmt)
    _check_gates(job)


def _settings(job: RunContext, fmt: QuantFormat | None) -> dict[str, Any]:
    plan = job.plan
    wanted = plan.recipe.evaluate
    chosen = wanted.model_dump(exclude={"gate", "batch", "form"})
    if fmt is None:
        asked = evaluation_questions(wanted.data, wanted.limit).identity()
        return chosen | {"source": source_identity(plan), "questions": asked}
    target = _target(job, fmt)
    folder = job.folder(fmt.name, target)
    store.require_manifest(folder, "build" if target == "engine" else "export")
    return chosen | {
        "target": target,
        "input": store.hash_manifest(folder),
        "baseline": store.hash_manifest(job.folder(BASELINE, "evaluate")),
    }


def _target(job: RunContext, fmt: QuantFormat) -> str:
    """The folder of a format that is asked: its engine, or the first of its exports."""
    engine = job.plan.recipe.evaluate.form == "engine"
    return "engine" if engine else job.plan.targets(fmt)[0]


def _evaluate_form(job: RunContext, fmt: QuantFormat | None) -> None:
    name = BASELINE if fmt is None else fmt.name
    folder = job.folder(name, "evaluate")
    settings = _settings(job, fmt)

    def body() -> StageOutput:
        wanted = job.plan.recipe.evaluate
        questions = evaluation_questions(wanted.data, wanted.limit)
        result: dict[str, Any] = {}
        shown: dict[str, str] = {}
        with _model(job, fmt) as model:
            answers = _answer(job, model, questions, None, name)
            result["accuracy"] = asdict(gqa.score(questions, answers))
            if "sight" in wanted.tasks:
                swapped = sight.swap_images(questions.items)
                shown = _answer(job, model, questions, swapped, f"{name} swapped")
                result["swapped"] = asdict(gqa.score(questions, shown))
        if job.parallel.rank != 0:
            return StageOutput()
        store.write_json(folder / "answers.json", {"own": answers, "swapped": shown})
        result |= _against_baseline(job, questions, answers, result) if fmt else {}
        store.write_json(folder / "gqa.json", result)
        return StageOutput(["answers.json", "gqa.json"])

    run_stage(job, f"evaluate {name}", folder, settings, body)


@contextmanager
def _model(job: RunContext, fmt: QuantFormat | None) -> Iterator[AnsweringModel]:
    """The export (or the source), read back by the independent runtime, in its own dtype.

    An engine is asked through TensorRT-LLM, and looks with its own tower.
    """
    plan = job.plan
    form = "hf_source" if fmt is None else _target(job, fmt)
    tokens = load_tokenizer(plan.folder / plan.family.decoder_subfolder)

    def decode(ids: list[int]) -> str:
        return tokens.decode(ids, skip_special_tokens=True)

    prepare = plan.family.make_preprocessor(plan.folder, plan.config)
    if form == "engine" and fmt is not None:
        with open_engine(job, fmt) as engine:
            yield AnsweringModel(engine, prepare, decode)
    else:
        _need_room(job)
        runtime = load_reference_model(job, form, fmt, job.dtype, job.parallel.device)
        yield AnsweringModel(runtime, prepare, decode, job.image_features)


def _need_room(job: RunContext) -> None:
    """Every rank has room for the whole model.

    Raises:
        UserError: one has not; thousands of questions are not for the host.
    """
    if not all(job.parallel.gather(fits_on_device(job, job.dtype))):
        size = full_model_bytes(job.plan, job.dtype.itemsize) / 1e9
        raise UserError(
            f"evaluate asks a model that is whole on each GPU, {size:,.1f} GB in {job.dtype}, and "
            "a GPU has no room for it; run evaluate alone where GPUs have more memory"
        )


def _answer(
    job: RunContext,
    model: AnsweringModel,
    questions: Questions,
    images: Mapping[str, str] | None,
    label: str,
) -> dict[str, str]:
    """Answers to all questions, on every rank."""
    parallel = job.parallel
    alone = isinstance(model.runtime, EngineRuntime)  # it has ranks of its own; rank 0 asks
    mine = tuple(split_evenly(questions.items, parallel.layout.world, parallel.rank))
    if alone:
        mine = questions.items if parallel.rank == 0 else ()
    own = replace(questions, items=mine)
    batch = job.plan.recipe.evaluate.batch
    with progress_bar(f"ask {label}", "question", parallel.rank, len(mine)) as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        answers = answer_all(model, own, images, batch=batch, progress=progress)
    together: dict[str, str] = {}
    for part in parallel.gather(answers):
        together.update(part)
    return {item.id: together[item.id] for item in questions.items}


def _against_baseline(
    job: RunContext, questions: Questions, answers: dict[str, str], result: dict[str, Any]
) -> dict[str, Any]:
    """Paired comparison with the 16 bit model, and whether the model still looks."""
    folder = job.folder(BASELINE, "evaluate")
    before = store.read_json(folder / "answers.json")
    right_before = gqa.judge(questions, before["own"])
    comparison = asdict(compare.compare(right_before, gqa.judge(questions, answers)))
    limit = job.plan.recipe.evaluate.gate.gqa_drop
    if limit is not None:
        passed = compare.gate(-comparison["difference"], limit)
        comparison["gate"] = {"limit": limit, "passed": passed}
    found: dict[str, Any] = {"comparison": comparison}
    if "swapped" in result:
        baseline = store.read_json(folder / "gqa.json")
        four = (
            result["accuracy"]["accuracy"],
            result["swapped"]["accuracy"],
            baseline["accuracy"]["accuracy"],
            baseline["swapped"]["accuracy"],
        )
        found |= {"sees": sight.sees(*four), "verdict": sight.verdict(*four)}
    return found


def _check_gates(job: RunContext) -> None:
    limit = job.plan.recipe.evaluate.gate.gqa_drop
    for fmt in job.plan.formats:
        result = read_result(job.folder(fmt.name, "evaluate"))
        if result.get("sees") is False:
            raise VerificationError(f"evaluate {fmt.name}: {result['verdict']}")
        drop = -result["comparison"]["difference"]
        if not compare.gate(drop, limit):
            raise VerificationError(
                f"evaluate {fmt.name}: GQA fell by {drop:.2f} points, {limit} are allowed"
            )


def read_result(folder: Path) -> dict[str, Any]:
    """gqa.json of a finished evaluation; empty when the stage has not run."""
    path = folder / "gqa.json"
    return store.read_json(path) if path.is_file() else {}
