"""Measures `nemo-vlm-ptq export` to TensorRT-LLM against a plain write of the same tensors.

    python benchmarks/exporting.py RECIPE [KEY=VALUE ...] [--repeats 3]

Every format of the recipe must have been solved in its workdir; what was exported to TensorRT-LLM
is removed and written again, by the recipe's ranks. Then as many processes as it has safetensors
files, the tower's among them, hold one each and write it beside, all at once. Prints a markdown
table with medians; 1 GB is 10^9 bytes. Nothing is dropped from the kernel's cache before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from watching import Rank, watch

from nemo_vlm_ptq.planning.plan import Plan, make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import read_json

FILES = "*/*.safetensors"
HEAD = {
    "format": "",
    "shards, GB": "bytes of each rank's file",
    "export, s": "seconds of the stage, without hashes",
    "export, GB/s": "bytes of the shards and the tower's file / these seconds",
    "plain write, GB/s": "the same bytes / seconds of the slowest plain write",
    "share": "of the plain write that the export reaches: the aim is 80 %",
    "over start, GB": "peak of a rank's own host memory over what it held when it began",
    "two layers, GB": "in 16 bit; the aim is a shard and two layers",
}


def plain_write(folder: Path, scratch: Path) -> float:
    """Seconds until all safetensors files of a checkpoint are written again from memory."""
    files = sorted(folder.glob(FILES))
    spawn = multiprocessing.get_context("spawn")
    barrier, times = spawn.Barrier(len(files)), spawn.Queue()
    writers = [
        spawn.Process(target=write_again, args=(file, scratch / file.name, barrier, times))
        for file in files
    ]
    for writer in writers:
        writer.start()
    seconds = max(times.get() for _ in writers)
    for writer in writers:
        writer.join()
    return seconds


def write_again(source: Path, target: Path, barrier: Any, times: Any) -> None:
    """One file, held in memory, written when all are held."""
    tensors = {name: tensor.clone() for name, tensor in load_file(source).items()}
    barrier.wait()
    begin = time.monotonic()
    save_file(tensors, target)
    times.put(time.monotonic() - begin)


def measure(name: str, words: list[str], plan: Plan, repeats: int) -> list[str]:
    """A row of the table."""
    work = Path(plan.recipe.workdir)
    folder = work / name / "trtllm"
    seconds, plain = [], []
    ranks: list[Rank] = []
    for _ in range(repeats):
        shutil.rmtree(folder, ignore_errors=True)
        given = [*words, f"quantize.format={name}", "export.targets=[trtllm]"]
        ranks = watch(["export", *given], folder)[1]
        seconds.append(read_json(folder / "manifest.json")["facts"]["seconds"])
        scratch = work / "plain-write"
        scratch.mkdir()
        plain.append(plain_write(folder, scratch))
        shutil.rmtree(scratch)
    every = {path: path.stat().st_size for path in sorted(folder.glob(FILES))}
    sizes = [size for path, size in every.items() if path.parent.name == "llm"]
    decoder = plan.decoder
    layer = 2 * decoder.hidden * (2 * decoder.heads * decoder.head_dim + 3 * decoder.ffn)
    layer += 4 * decoder.hidden * decoder.kv_heads * decoder.head_dim
    own, write = (
        sum(every.values()) / statistics.median(found) / 1e9 for found in (seconds, plain)
    )
    cells = [name, _gigabytes(sizes), f"{statistics.median(seconds):.2f}", f"{own:.2f}"]
    cells += [f"{write:.2f}", f"{100 * own / write:.0f} %"]
    return [
        *cells,
        _gigabytes([rank.peak - rank.before for rank in ranks]),
        f"{2 * layer / 1e9:.2f}",
    ]


def _gigabytes(sizes: list[int]) -> str:
    return " / ".join(f"{size / 1e9:.2f}" for size in sizes)


def main() -> None:
    """Measure every format and print the table."""
    parser = argparse.ArgumentParser(description="measures the export to TensorRT-LLM")
    parser.add_argument("words", nargs="+", metavar="RECIPE [KEY=VALUE]")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    plan = make_plan(load_recipe(chosen.words[0], chosen.words[1:]))
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD))
    for fmt in plan.formats:
        cells = measure(fmt.name, chosen.words, plan, chosen.repeats)
        print("| " + " | ".join(cells) + " |", flush=True)
    print("\nRanks are parted by a slash.")
    for key, meaning in HEAD.items():
        if meaning:
            print(f"* {key}: {meaning}.")


if __name__ == "__main__":
    main()
