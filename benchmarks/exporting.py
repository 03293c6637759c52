"""Measure `nemo-vlm-ptq export` to TensorRT-LLM against a plain write of the same tensors.

    python benchmarks/exporting.py RECIPE [KEY=VALUE ...] [--repeats 3]

Every format of the recipe must have been solved in its workdir. The TensorRT-LLM export is removed
and written again by the recipe's ranks. Then one process per safetensors file, the vision tower's
included, loads its file and writes it to another folder, all at the same time. Prints a markdown
table of medians; 1 GB is 10^9 bytes. The kernel's page cache is not dropped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from memory_sampling import RankMemory, run_sampled
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import read_json

FILE_PATTERN = "*/*.safetensors"
COLUMNS = {  # column -> explanation
    "format": "",
    "shards, GB": "size of each rank's file",
    "export, s": "seconds of the stage, without hashing",
    "export, GB/s": "bytes of the shards and of the vision tower's file / seconds of the stage",
    "plain write, GB/s": "the same bytes / seconds of the slowest plain write",
    "share": "export rate / plain write rate; goal: at least 80 %",
    "over start, GB": "peak host memory of each rank minus its memory at the start",
    "two layers, GB": "size of two layers in 16 bit; goal: over start at most a shard plus this",
}


def time_plain_write(folder: Path, scratch: Path) -> float:
    """Return the seconds to write all safetensors files of a checkpoint again from memory."""
    files = sorted(folder.glob(FILE_PATTERN))
    spawn = multiprocessing.get_context("spawn")
    barrier, times = spawn.Barrier(len(files)), spawn.Queue()
    writers = [
        spawn.Process(target=rewrite_file, args=(file, scratch / file.name, barrier, times))
        for file in files
    ]
    for writer in writers:
        writer.start()
    seconds = max(times.get() for _ in writers)
    for writer in writers:
        writer.join()
    return seconds


def rewrite_file(source: Path, target: Path, barrier: Any, times: Any) -> None:
    """Load one file, wait until all processes have loaded theirs, and time the write."""
    tensors = {name: tensor.clone() for name, tensor in load_file(source).items()}
    barrier.wait()
    start = time.monotonic()
    save_file(tensors, target)
    times.put(time.monotonic() - start)


def measure(name: str, arguments: list[str], plan: Plan, repeats: int) -> list[str]:
    """Measure the export of one format; return a row of the table."""
    work = Path(plan.recipe.workdir)
    folder = work / name / "trtllm"
    export_seconds, plain_seconds = [], []
    ranks: list[RankMemory] = []
    for _ in range(repeats):
        shutil.rmtree(folder, ignore_errors=True)
        overrides = [f"quantize.format={name}", "export.targets=[trtllm]"]
        ranks = run_sampled(["export", *arguments, *overrides], folder)[1]
        export_seconds.append(read_json(folder / "manifest.json")["facts"]["seconds"])
        scratch = work / "plain-write"
        scratch.mkdir()
        plain_seconds.append(time_plain_write(folder, scratch))
        shutil.rmtree(scratch)
    sizes = {path: path.stat().st_size for path in sorted(folder.glob(FILE_PATTERN))}
    shard_sizes = [size for path, size in sizes.items() if path.parent.name == "llm"]
    decoder = plan.decoder
    layer_bytes = 2 * decoder.hidden * (2 * decoder.heads * decoder.head_dim + 3 * decoder.ffn)
    layer_bytes += 4 * decoder.hidden * decoder.kv_heads * decoder.head_dim
    export_rate, plain_rate = (
        sum(sizes.values()) / statistics.median(seconds) / 1e9
        for seconds in (export_seconds, plain_seconds)
    )
    return [
        name,
        _gigabytes(shard_sizes),
        f"{statistics.median(export_seconds):.2f}",
        f"{export_rate:.2f}",
        f"{plain_rate:.2f}",
        f"{100 * export_rate / plain_rate:.0f} %",
        _gigabytes([rank.peak - rank.start for rank in ranks]),
        f"{2 * layer_bytes / 1e9:.2f}",
    ]


def _gigabytes(sizes: list[int]) -> str:
    return " / ".join(f"{size / 1e9:.2f}" for size in sizes)


def main() -> None:
    """Measure every format and print the table."""
    parser = argparse.ArgumentParser(description="measure the export to TensorRT-LLM")
    parser.add_argument("recipe", nargs="+", metavar="RECIPE [KEY=VALUE]")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    plan = make_plan(load_recipe(args.recipe[0], args.recipe[1:]))
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for fmt in plan.formats:
        cells = measure(fmt.name, args.recipe, plan, args.repeats)
        print("| " + " | ".join(cells) + " |", flush=True)
    print("\nValues of several ranks are separated by a slash.")
    for column, explanation in COLUMNS.items():
        if explanation:
            print(f"* {column}: {explanation}.")


if __name__ == "__main__":
    main()
