"""Measure `nemo-vlm-ptq import`: seconds, bytes read and memory per rank, against a plain copy.

    python benchmarks/importing.py FOLDER [FOLDER ...] [--tensor 2] [--layers N] [--scratch DIR]

FOLDER is a model folder, or a model name of random_model.py; then the weights are first written to
the scratch folder, with --layers decoder layers. Work folder and copy are in the scratch folder
too, which should be on the disk of the models (default: the parent of the first folder). Prints a
markdown table; 1 GB is 10^9 bytes. Columns "over start" subtract the memory of a rank when the
import started (Python, torch, megatron-core). The vision tower is copied from file to file through
mapped pages, which "memory" does not count, but the shard of rank 0 does: where it has a tower, the
ratio of rank 1 is more meaningful.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory_sampling import RankMemory, run_sampled
from random_model import write_model

from nemo_vlm_ptq.planning.forecast import rank_parameters
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import read_json, write_json

MAX_COLD_SHARE = 0.1  # of a file that may be cached when it counts as cold
PROBED_PAGES = 1000  # pages that are looked up in the page cache
DROP_ATTEMPTS = 5  # the kernel may keep pages that were written recently
COLUMNS = {  # column -> explanation
    "model": "",
    "cache": "state of the source files in the page cache before import and copy",
    "import s": "seconds of the stage; in parentheses the whole command, with start-up and hashing",
    "read per rank": "GB of the source that each rank requested, vision tower included",
    "disk": "GB that all ranks and their child processes read from disk",
    "shard": "GB of each rank's shard in 16 bit, with the vision tower on rank 0",
    "memory": "peak GB of host memory per rank, with child processes, without pages of files",
    "over start": "(memory - memory at the start of the import) / shard; goal: at most 1.3",
    "resident": "peak GB of resident memory per rank, with pages of mapped files",
    "resident over start": "(resident - resident at the start of the import) / shard",
    "import GB/s": "bytes read by all ranks / seconds of the stage, which also writes them",
    "copy GB/s": "bytes of the source files / seconds of cp and sync",
}


def drop_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to drop the cached pages of these files only."""
    subprocess.run(["sync", *files], check=True)
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Sequence[Path]) -> float:
    """Estimate the share of these files in the page cache from a sample of their pages."""
    hits = total = 0
    step = max(1, sum(path.stat().st_size for path in files) // mmap.PAGESIZE // PROBED_PAGES)
    for path in files:
        with path.open("rb") as file:
            for page in range(0, -(-path.stat().st_size // mmap.PAGESIZE), step):
                total += 1
                try:
                    offset = page * mmap.PAGESIZE
                    hits += bool(os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT))
                except BlockingIOError:
                    pass
    return hits / total


def prepare_cache(files: Sequence[Path]) -> str:
    """Drop the source files from the cache, or load them if the kernel keeps them.

    Returns:
        "cold", "warm", or how much is cached.
    """
    for _ in range(DROP_ATTEMPTS):
        drop_cache(files)
        if cached_share(files) < MAX_COLD_SHARE:
            return "cold"
        time.sleep(1)
    for path in files:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    share = cached_share(files)
    return "warm" if share > 1 - MAX_COLD_SHARE else f"{100 * share:.0f} % warm"


def time_copy(files: Sequence[Path], folder: Path) -> float:
    """Return the seconds of a plain copy, synced to disk."""
    folder.mkdir()
    start = time.monotonic()
    copies = [folder / f"{number}" for number in range(len(files))]
    for path, copy in zip(files, copies, strict=True):
        subprocess.run(["cp", path, copy], check=True)
    subprocess.run(["sync", *copies], check=True)
    seconds = time.monotonic() - start
    for copy in copies:
        copy.unlink()
    return seconds


def measure(model: Path, tensor: int, scratch: Path) -> dict[str, str]:
    """Measure the import of one model; return column -> cell."""
    work = scratch / "work"
    recipe_path = scratch / "recipe.yaml"  # JSON is YAML
    recipe = {
        "model": str(model.resolve()),
        "workdir": str(work),
        "stages": ["import"],
        "parallel": {"tensor": tensor, "data": 1},
        "quantize": {"format": ["fp8"]},
        "export": {"targets": ["compressed_tensors"]},
    }
    write_json(recipe_path, recipe)
    plan = make_plan(load_recipe(str(recipe_path)))
    files = sorted({source.file for source in plan.tensors.values()})
    cache_before_copy = prepare_cache(files)
    copy_seconds = time_copy(files, scratch / "copy")
    cache = prepare_cache(files)
    seconds, ranks = run_sampled(["import", str(recipe_path)], work / "megatron")
    facts = read_json(work / "megatron" / "manifest.json")["facts"]
    if cache != cache_before_copy:
        cache = f"{cache}, copy {cache_before_copy}"
    source_bytes = sum(path.stat().st_size for path in files)
    return rank_cells(plan, ranks, facts, seconds) | {
        "model": model.name,
        "cache": cache,
        "copy GB/s": f"{source_bytes / copy_seconds / 1e9:.2f}",
    }


def rank_cells(
    plan: Plan, ranks: Sequence[RankMemory], facts: dict[str, Any], seconds: float
) -> dict[str, str]:
    """Return column -> cell from the sampled memory of the ranks and the stage's manifest.

    Args:
        plan: plan of the import.
        ranks: sampled memory of each rank.
        facts: facts of the stage's manifest.
        seconds: seconds of the whole command.
    """
    tower_bytes = 2 * sum(math.prod(plan.tensors[name].shape) for name in plan.vision_names)
    decoder_bytes = 2 * rank_parameters(plan, plan.recipe.parallel.tensor)
    shards = [decoder_bytes + tower_bytes * (rank == 0) for rank in range(len(ranks))]
    read = [size + tower_bytes * (rank == 0) for rank, size in enumerate(facts["bytes_read"])]
    resident = facts["memory"]
    return {
        "import s": f"{facts['seconds']:.1f} ({seconds:.1f})",
        "read per rank": _gigabytes(read),
        "disk": f"{sum(sum(rank.disk_reads.values()) for rank in ranks) / 1e9:.2f}",
        "shard": _gigabytes(shards),
        "memory": _gigabytes([rank.peak for rank in ranks]),
        "over start": _ratios([rank.peak - rank.start for rank in ranks], shards),
        "resident": _gigabytes([rank["peak"] for rank in resident]),
        "resident over start": _ratios(
            [rank["peak"] - rank["before"] for rank in resident], shards
        ),
        "import GB/s": f"{sum(read) / facts['seconds'] / 1e9:.2f}",
    }


def _gigabytes(sizes: Sequence[int]) -> str:
    return " / ".join(f"{size / 1e9:.2f}" for size in sizes)


def _ratios(sizes: Sequence[int], shards: Sequence[int]) -> str:
    return " / ".join(f"{size / shard:.2f}" for size, shard in zip(sizes, shards, strict=True))


@contextmanager
def model_folder(name: str, layers: int | None, scratch: Path) -> Iterator[Path]:
    """Yield an existing model folder, or a temporary one with random weights.

    Raises:
        SystemExit: `layers` is set for an existing folder.
    """
    if Path(name).is_dir():
        if layers is not None:
            raise SystemExit(
                f"--layers is supported only for models of random_model.py; {name} is a folder"
            )
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        folder = Path(parent) / name
        start = time.monotonic()
        write_model(name, folder, layers, weights_only=True)
        print(f"{name} written in {time.monotonic() - start:.0f} s", file=sys.stderr)
        yield folder


def main() -> None:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description="measure the import of model folders")
    parser.add_argument("models", nargs="+", metavar="FOLDER")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    first = Path(args.models[0])
    scratch_parent = args.scratch or (first.resolve().parent if first.is_dir() else None)
    if scratch_parent is not None:
        scratch_parent.mkdir(parents=True, exist_ok=True)
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for name in args.models:
        with (
            tempfile.TemporaryDirectory(dir=scratch_parent) as scratch,
            model_folder(name, args.layers, Path(scratch)) as folder,
        ):
            cells = measure(folder, args.tensor, Path(scratch))
        print("| " + " | ".join(cells[column] for column in COLUMNS) + " |", flush=True)
    print(f"\nTP {args.tensor}; values of several ranks are separated by a slash, rank 0 first.")
    for column, explanation in COLUMNS.items():
        if explanation:
            print(f"* {column}: {explanation}.")


if __name__ == "__main__":
    main()
