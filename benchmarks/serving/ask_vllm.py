"""Compare vLLM's answers with those that `evaluate` scored, for the exports of finished runs.

    python benchmarks/serving/ask_vllm.py WORKDIR ... [--limit N] [--points 0.5]

Needs a GPU, and vLLM on the Python path together with this repository; the other requirements of
this package are not needed. For every WORKDIR, the 16 bit source and each format's evaluated export
(targets hf and compressed_tensors) are loaded one after another in one process, and answer all
questions of the run, or the first N, in the prompt format of the family. Prints a table of GQA
accuracies and of the share of equal answers. The exit code is 1 if an accuracy differs by more than
--points.

tiny-phi needs other constants in vLLM's code, see tiny_phi.py.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_phi

from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, Questions, load_questions
from nemo_vlm_ptq.evaluate import gqa
from nemo_vlm_ptq.workdir.store import read_json

PROMPTS = {  # model_type -> prompt format
    "llava": "USER: <image>\n{question} ASSISTANT:",
    "phi3_v": "<|user|>\n<|image_1|>\n{question}<|end|>\n<|assistant|>\n",
}
TARGETS = ("hf", "compressed_tensors")
MAX_NEW_TOKENS = 16  # as in `evaluate`
HEAD = (
    "model",
    "format",
    "target",
    "questions",
    "evaluate, %",
    "vLLM, %",
    "difference, points",
    "equal answers, %",
)


@dataclass(frozen=True, kw_only=True)
class EvaluatedCheckpoint:
    """A checkpoint that `evaluate` scored.

    model: name of the source model.
    format: name of the format, or 16bit.
    target: export target, or source.
    folder: the checkpoint.
    questions: questions to answer.
    answers: question id -> answer of `evaluate`.
    """

    model: str
    format: str
    target: str
    folder: Path
    questions: Questions
    answers: dict[str, str]


def evaluated_checkpoints(work: Path, limit: int | None) -> Iterator[EvaluatedCheckpoint]:
    """Yield the source of a run, then its exports.

    Args:
        work: the work folder of the run.
        limit: largest number of questions; None for all.
    """
    source = Path(read_json(work / "megatron" / "manifest.json")["settings"]["model"])
    for path in sorted(work.glob("*/evaluate"), key=lambda path: path.parent.name != "16bit"):
        settings = read_json(path / "manifest.json")["settings"]
        name, target = path.parent.name, settings.get("target", "source")
        if target not in ("source", *TARGETS):
            continue
        questions = load_questions(settings["data"], "test", settings["limit"])
        yield EvaluatedCheckpoint(
            model=source.name,
            format=name,
            target=target,
            folder=source if target == "source" else work / name / target,
            questions=replace(questions, items=questions.items[:limit]),
            answers=read_json(path / "answers.json")["own"],
        )


def generate_answers(checkpoint: EvaluatedCheckpoint) -> dict[str, str]:
    """Return question id -> vLLM's answer, with greedy decoding."""
    from vllm import LLM, SamplingParams

    model_type = read_json(checkpoint.folder / "config.json")["model_type"]
    llm = LLM(
        model=str(checkpoint.folder),
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=128,
        kv_cache_memory_bytes=2 << 30,
        gpu_memory_utilization=0.3,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
        disable_log_stats=True,
        seed=0,
    )
    questions = checkpoint.questions
    images: dict[str, Any] = {}
    prompts = []
    for item in questions.items:
        (name,) = item.images
        if name not in images:
            images[name] = questions.load_image(name)
        text = PROMPTS[model_type].format(question=item.text + PROMPT_SUFFIX)
        prompts.append({"prompt": text, "multi_modal_data": {"image": images[name]}})
    greedy = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    results = llm.generate(prompts, greedy, use_tqdm=False)
    texts = [result.outputs[0].text for result in results]
    return {item.id: text for item, text in zip(questions.items, texts, strict=True)}


def free_gpu() -> None:
    """Free the GPU memory for the next model."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def compare(
    checkpoint: EvaluatedCheckpoint, vllm_answers: dict[str, str]
) -> tuple[float, list[str]]:
    """Return the difference of the accuracies in points, and a row of the table."""
    questions, answers = checkpoint.questions, checkpoint.answers
    expected = gqa.score(questions, answers).accuracy
    accuracy = gqa.score(questions, vllm_answers).accuracy
    ids = [item.id for item in questions.items]
    equal = sum(gqa.normalize(answers[name]) == gqa.normalize(vllm_answers[name]) for name in ids)
    row = [
        checkpoint.model,
        checkpoint.format,
        checkpoint.target,
        str(len(ids)),
        f"{expected:.2f}",
        f"{accuracy:.2f}",
        f"{accuracy - expected:+.2f}",
        f"{100 * equal / len(ids):.2f}",
    ]
    return accuracy - expected, row


def main() -> None:
    """Compare every checkpoint; the exit code is 1 if an accuracy differs."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tiny_phi patches this process only
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    parser = argparse.ArgumentParser(description="compare vLLM's answers with those of evaluate")
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--points", type=float, default=0.5)
    args = parser.parse_args()
    tiny_phi.patch_vllm()
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    failures = 0
    for work in args.workdirs:
        for checkpoint in evaluated_checkpoints(work, args.limit):
            start = time.time()
            difference, row = compare(checkpoint, generate_answers(checkpoint))
            free_gpu()
            failures += abs(difference) > args.points
            print("| " + " | ".join(row) + " |", flush=True)
            print(f"{checkpoint.folder}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
