"""Measures `nemo-vlm-ptq import`: seconds, bytes read, memory a rank, against a plain copy.

    python benchmarks/importing.py FOLDER [FOLDER ...] [--tensor 2] [--layers N] [--scratch DIR]

FOLDER is a model folder, or a name that random_model.py knows: then it is made in the scratch
folder first, weights only, with --layers decoder layers. Work folder and copy go into the scratch
folder too, which should be on the disk of the models (default: the folder that holds the first).
Prints a markdown table. Nothing is subtracted but where "over start" says so: from a rank's peak,
what it held when the import began (Python, torch, megatron-core). 1 GB is 10^9 bytes. The tower
goes from file to file through mapped pages, which "held" does not count: where the first rank's
shard has a tower, the ratio of the second says more.
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

from random_model import write_model
from watching import Rank, watch

from nemo_vlm_ptq.planning.forecast import rank_parameters
from nemo_vlm_ptq.planning.plan import Plan, make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import read_json, write_json

COLD = 0.1  # share of a file that may be cached still
PROBES = 1000  # pages that are looked for in the cache
TRIES = 5  # it does not always let go of pages that were written a moment ago
HEAD = {
    "model": "",
    "cache": "of the source files before import and copy",
    "import s": "seconds of the stage; in brackets the whole command, with start and hashes",
    "read a rank": "GB of the source that a rank asked for, its tower included",
    "disk": "GB that all ranks and their helpers made the disk read",
    "shard": "GB of a rank's shard at 2 bytes, and the tower on the first",
    "held": "peak GB of host memory of a rank's own, with its helpers, without pages of files",
    "over start": "(held - held at the start of the import) / shard: the aim is 1.3",
    "resident": "peak GB of the rank as the kernel counts it, with pages of mapped files",
    "resident over start": "the same over what it was at the start, / shard",
    "import GB/s": "bytes read by all ranks / seconds of the stage, which also writes them",
    "copy GB/s": "bytes of the source files / seconds of cp and sync",
}


def drop_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the pages of some files; no other file is touched."""
    subprocess.run(["sync", *files], check=True)
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(files: Sequence[Path]) -> float:
    """Share of some files that is in the kernel's cache, from a sample of their pages."""
    hits = total = 0
    step = max(1, sum(path.stat().st_size for path in files) // mmap.PAGESIZE // PROBES)
    for path in files:
        with path.open("rb") as file:
            for page in range(0, -(-path.stat().st_size // mmap.PAGESIZE), step):
                total += 1
                try:
                    place = page * mmap.PAGESIZE
                    hits += bool(os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT))
                except BlockingIOError:
                    pass
    return hits / total


def prepare_cache(files: Sequence[Path]) -> str:
    """Make the source cold, or, where the kernel does not let go of it, warm; says which."""
    for _ in range(TRIES):
        drop_cache(files)
        if cached(files) < COLD:
            return "cold"
        time.sleep(1)
    for path in files:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    share = cached(files)
    return "warm" if share > 1 - COLD else f"{100 * share:.0f} % warm"


def copy_seconds(files: Sequence[Path], folder: Path) -> float:
    """Seconds of a plain copy, until it is on disk."""
    folder.mkdir()
    begin = time.monotonic()
    copies = [folder / f"{number}" for number in range(len(files))]
    for path, copy in zip(files, copies, strict=True):
        subprocess.run(["cp", path, copy], check=True)
    subprocess.run(["sync", *copies], check=True)
    seconds = time.monotonic() - begin
    for copy in copies:
        copy.unlink()
    return seconds


def measure(model: Path, tensor: int, scratch: Path) -> dict[str, str]:
    """A row of the table."""
    work = scratch / "work"
    recipe = scratch / "recipe.yaml"  # JSON is YAML
    wanted = {
        "model": str(model.resolve()),
        "workdir": str(work),
        "stages": ["import"],
        "parallel": {"tensor": tensor, "data": 1},
        "quantize": {"format": ["fp8"]},
    }
    write_json(recipe, wanted)
    plan = make_plan(load_recipe(str(recipe)))
    files = sorted({place.file for place in plan.tensors.values()})
    cache = prepare_cache(files)
    copied = copy_seconds(files, scratch / "copy")
    again = prepare_cache(files)
    seconds, ranks = watch(["import", str(recipe)], work / "megatron")
    facts = read_json(work / "megatron" / "manifest.json")["facts"]
    cache = cache if cache == again else f"{again}, for the copy {cache}"
    size = sum(path.stat().st_size for path in files)
    return row(plan, ranks, facts, seconds) | {
        "model": model.name,
        "cache": cache,
        "copy GB/s": f"{size / copied / 1e9:.2f}",
    }


def row(plan: Plan, ranks: Sequence[Rank], facts: dict[str, Any], seconds: float) -> dict[str, str]:
    """Cells from what was seen of the ranks and what they said themselves."""
    tower = 2 * sum(math.prod(plan.tensors[name].shape) for name in plan.vision_names)
    shard = 2 * rank_parameters(plan, plan.recipe.parallel.tensor)
    shards = [shard + tower * (not rank) for rank in range(len(ranks))]
    read = [own + tower * (not rank) for rank, own in enumerate(facts["bytes_read"])]
    said = facts["memory"]
    return {
        "import s": f"{facts['seconds']:.1f} ({seconds:.1f})",
        "read a rank": _gigabytes(read),
        "disk": f"{sum(sum(rank.disk.values()) for rank in ranks) / 1e9:.2f}",
        "shard": _gigabytes(shards),
        "held": _gigabytes([rank.peak for rank in ranks]),
        "over start": _ratios([rank.peak - rank.before for rank in ranks], shards),
        "resident": _gigabytes([one["peak"] for one in said]),
        "resident over start": _ratios([one["peak"] - one["before"] for one in said], shards),
        "import GB/s": f"{sum(read) / facts['seconds'] / 1e9:.2f}",
    }


def _gigabytes(sizes: Sequence[int]) -> str:
    return " / ".join(f"{size / 1e9:.2f}" for size in sizes)


def _ratios(sizes: Sequence[int], shards: Sequence[int]) -> str:
    return " / ".join(f"{size / own:.2f}" for size, own in zip(sizes, shards, strict=True))


@contextmanager
def model_folder(name: str, layers: int | None, scratch: Path) -> Iterator[Path]:
    """A folder that is there, or one made for as long as it is needed."""
    if Path(name).is_dir():
        if layers is not None:
            raise SystemExit(f"--layers is for models that are made here; {name} is a folder")
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(dir=scratch) as home:
        folder = Path(home) / name
        begin = time.monotonic()
        write_model(name, folder, layers, weights_only=True)
        print(f"{name} made in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        yield folder


def main() -> None:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description="measures the import of model folders")
    parser.add_argument("models", nargs="+", metavar="FOLDER")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scratch", type=Path)
    chosen = parser.parse_args()
    first = Path(chosen.models[0])
    home = chosen.scratch or (first.resolve().parent if first.is_dir() else None)
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD))
    for name in chosen.models:
        with (
            tempfile.TemporaryDirectory(dir=home) as scratch,
            model_folder(name, chosen.layers, Path(scratch)) as folder,
        ):
            cells = measure(folder, chosen.tensor, Path(scratch))
        print("| " + " | ".join(cells[key] for key in HEAD) + " |", flush=True)
    print(f"\nTP {chosen.tensor}; a rank's figures are parted by a slash, the first rank first.")
    for key, meaning in HEAD.items():
        if meaning:
            print(f"* {key}: {meaning}.")


if __name__ == "__main__":
    main()
