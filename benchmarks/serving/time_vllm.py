"""Times vLLM on model folders: tokens a second, one next to the other.

    python benchmarks/serving/time_vllm.py FOLDER ... [--sequences 1 64] [--new-tokens 128]

Needs vLLM on the Python path, and a GPU. Each folder is loaded in a process of its own, with CUDA
graphs for decoding, no compilation and no prefix cache. A request is a picture and a question.
"First token" is the time until all sequences have theirs, image processing included; decoding is
what the other tokens take. Medians of three runs after one that does not count. Prints a markdown
table; ratios are to the first folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import PIL.Image

RUNS = 3
PROMPT = "USER: <image>\nis there a red circle to the left of the square? ASSISTANT:"
HEAD = (
    "folder",
    "weights, GB",
    "loaded, s",
    "sequences",
    "first token, s",
    "decode, tokens/s",
    "x",
)


def load(folder: str, sequences: int) -> Any:
    """vLLM with a model."""
    from vllm import LLM

    return LLM(
        model=folder,
        max_model_len=1024,
        max_num_seqs=sequences,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.85,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, sequences],
        },
        disable_log_stats=True,
        seed=0,
    )


def seconds(llm: Any, sequences: int, tokens: int) -> float:
    """Median of the seconds that so many requests take for so many new tokens each."""
    from vllm import SamplingParams

    image = PIL.Image.effect_noise((336, 336), 64).convert("RGB")
    asked = [{"prompt": PROMPT, "multi_modal_data": {"image": image}}] * sequences
    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    found = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        llm.generate(asked, wanted, use_tqdm=False)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def measure(folder: str, sequences: list[int], tokens: int) -> list[tuple[str, int, float, float]]:
    """Rows (seconds to load, sequences, seconds to the first token, tokens/s after it)."""
    start = time.perf_counter()
    llm = load(folder, max(sequences))
    loaded = f"{time.perf_counter() - start:.1f}"
    rows = []
    for count in sequences:
        first = seconds(llm, count, 1)
        rest = seconds(llm, count, tokens) - first
        rows.append((loaded, count, first, count * (tokens - 1) / rest))
    return rows


def main() -> None:
    """Time every folder and print the table."""
    parser = argparse.ArgumentParser(description="times vLLM on model folders")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    wanted = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    base: dict[int, float] = {}
    for folder in wanted.folders:
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e9
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            rows = alone.apply(measure, (folder, wanted.sequences, wanted.new_tokens))
        for loaded, count, first, rate in rows:
            ratio = rate / base.setdefault(count, rate)
            cells = [folder, f"{size:.2f}", loaded, str(count), f"{first:.2f}", f"{rate:,.0f}"]
            print("| " + " | ".join([*cells, f"{ratio:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
