"""Asks vLLM the questions that the exported checkpoints of finished runs were scored on.

    python benchmarks/serving/ask_vllm.py WORKDIR ... [--limit N] [--points 0.5]

Needs vLLM beside this repository on the Python path, and a GPU; nothing of this package's other
requirements. Of every WORKDIR the 16 bit source and each format's evaluated export (targets hf and
compressed_tensors) are loaded, one after another in one process, and asked in the family's prompt:
all questions of the run, or the first N. Prints a table of GQA accuracies, ours read from the run's
answers, and how many answers are the same; ends with 1 when one differs by more than --points.

tiny-phi needs constants of vLLM's code changed: tiny_phi.py.
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

PROMPTS = {  # model_type -> the family's prompt
    "llava": "USER: <image>\n{question} ASSISTANT:",
    "phi3_v": "<|user|>\n<|image_1|>\n{question}<|end|>\n<|assistant|>\n",
}
TARGETS = ("hf", "compressed_tensors")
NEW_TOKENS = 16  # as `evaluate` asks for
HEAD = ("model", "format", "target", "questions", "ours, %", "vLLM, %", "points", "same answers, %")


@dataclass(frozen=True)
class Case:
    """A checkpoint folder, the questions it was asked, and its answers (question id -> text)."""

    model: str
    format: str
    target: str
    folder: Path
    questions: Questions
    answers: dict[str, str]


def cases(work: Path, limit: int | None) -> Iterator[Case]:
    """The source of a run first, then its exports."""
    source = Path(read_json(work / "megatron" / "manifest.json")["settings"]["model"])
    for path in sorted(work.glob("*/evaluate"), key=lambda path: path.parent.name != "16bit"):
        settings = read_json(path / "manifest.json")["settings"]
        name, target = path.parent.name, settings.get("target", "source")
        folder = source if target == "source" else work / name / target
        if target not in ("source", *TARGETS):
            continue
        questions = load_questions(settings["data"], "test", settings["limit"])
        questions = replace(questions, items=questions.items[:limit])
        answers = read_json(path / "answers.json")["own"]
        yield Case(source.name, name, target, folder, questions, answers)


def ask(case: Case) -> dict[str, str]:
    """Question id -> what vLLM answers, greedy."""
    from vllm import LLM, SamplingParams

    kind = read_json(case.folder / "config.json")["model_type"]
    llm = LLM(
        model=str(case.folder),
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
    images: dict[str, Any] = {}
    prompts = []
    for item in case.questions.items:
        if item.image not in images:
            images[item.image] = case.questions.image(item.image)
        text = PROMPTS[kind].format(question=item.text + PROMPT_SUFFIX)
        prompts.append({"prompt": text, "multi_modal_data": {"image": images[item.image]}})
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    found = llm.generate(prompts, greedy, use_tqdm=False)
    texts = [one.outputs[0].text for one in found]
    return {item.id: text for item, text in zip(case.questions.items, texts, strict=True)}


def let_go() -> None:
    """Free the GPU for the next model."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def compared(case: Case, answers: dict[str, str]) -> tuple[float, list[str]]:
    """Points between the two accuracies, and the row of the table."""
    ours = gqa.score(case.questions, case.answers).accuracy
    theirs = gqa.score(case.questions, answers).accuracy
    ids = [item.id for item in case.questions.items]
    same = sum(gqa.normalize(case.answers[name]) == gqa.normalize(answers[name]) for name in ids)
    share = 100 * same / len(ids)
    row = [case.model, case.format, case.target, str(len(ids)), f"{ours:.2f}", f"{theirs:.2f}"]
    return theirs - ours, [*row, f"{theirs - ours:+.2f}", f"{share:.2f}"]


def main() -> None:
    """Ask every checkpoint; ends with 1 when one answers differently."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tiny_phi changes this process
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    parser = argparse.ArgumentParser(description="asks vLLM what exported checkpoints were asked")
    parser.add_argument("works", nargs="+", type=Path, metavar="WORKDIR")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--points", type=float, default=0.5)
    wanted = parser.parse_args()
    tiny_phi.fit_vllm()
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    wrong = 0
    for work in wanted.works:
        for case in cases(work, wanted.limit):
            start = time.time()
            points, row = compared(case, ask(case))
            let_go()
            wrong += abs(points) > wanted.points
            print("| " + " | ".join(row) + " |", flush=True)
            print(f"{case.folder}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
