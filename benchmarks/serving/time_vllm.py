"""Measure vLLM's throughput on model folders.

    python benchmarks/serving/time_vllm.py FOLDER ... [--sequences 1 64] [--new-tokens 128]

Needs a GPU and vLLM on the Python path. Each folder is loaded in a new process, with CUDA graphs
for decoding, without compilation and without prefix caching. A request is an image and a question.
"first token" is the time until all sequences have their first token, image processing included;
decoding is the time of the remaining tokens. Medians of three runs after a warm-up. Prints a
markdown table; ratios are to the first folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

RUNS = 3
PROMPT = "USER: <image>\nis there a red circle to the left of the square? ASSISTANT:"
HEAD = (
    "folder",
    "weights, GB",
    "load, s",
    "sequences",
    "first token, s",
    "decode, tokens/s",
    "x first folder",
)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Timing of one folder with a number of concurrent sequences.

    load_seconds: seconds to load the model.
    sequences: concurrent sequences.
    first_token_seconds: seconds until all sequences have their first token.
    tokens_per_second: decoded tokens per second after the first, of all sequences.
    """

    load_seconds: float
    sequences: int
    first_token_seconds: float
    tokens_per_second: float


def load(folder: str, max_sequences: int) -> Any:
    """Load a model in vLLM."""
    from vllm import LLM

    return LLM(
        model=folder,
        max_model_len=1024,
        max_num_seqs=max_sequences,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.85,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, max_sequences],
        },
        disable_log_stats=True,
        seed=0,
    )


def generate_seconds(llm: Any, sequences: int, new_tokens: int) -> float:
    """Return the median seconds to generate `new_tokens` tokens for each of the sequences."""
    from vllm import SamplingParams

    image = PIL.Image.effect_noise((336, 336), 64).convert("RGB")
    requests = [{"prompt": PROMPT, "multi_modal_data": {"image": image}}] * sequences
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        llm.generate(requests, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure(folder: str, sequence_counts: list[int], new_tokens: int) -> list[Throughput]:
    """Load a folder and time it with each number of sequences."""
    start = time.perf_counter()
    llm = load(folder, max(sequence_counts))
    load_seconds = time.perf_counter() - start
    results = []
    for sequences in sequence_counts:
        first_token_seconds = generate_seconds(llm, sequences, 1)
        decode_seconds = generate_seconds(llm, sequences, new_tokens) - first_token_seconds
        results.append(
            Throughput(
                load_seconds=load_seconds,
                sequences=sequences,
                first_token_seconds=first_token_seconds,
                tokens_per_second=sequences * (new_tokens - 1) / decode_seconds,
            )
        )
    return results


def main() -> None:
    """Time every folder and print the table."""
    parser = argparse.ArgumentParser(description="measure vLLM's throughput on model folders")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    base: dict[int, float] = {}
    for folder in args.folders:
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e9
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results = pool.apply(measure, (folder, args.sequences, args.new_tokens))
        for result in results:
            rate = result.tokens_per_second
            cells = [
                folder,
                f"{size:.2f}",
                f"{result.load_seconds:.1f}",
                str(result.sequences),
                f"{result.first_token_seconds:.2f}",
                f"{rate:,.0f}",
                f"{rate / base.setdefault(result.sequences, rate):.2f}",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
