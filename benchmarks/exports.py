"""Exports the small models in every format to every target and prints how far their logits are off.

    python benchmarks/exports.py [tiny-llava tiny-vila tiny-phi] [--samples 64] [--scratch DIR]

Each model is calibrated once. TensorRT-LLM checkpoints are cut for 1, 2 and 4 ranks, int4 for 1 and
2: groups allow no more in models this small. `verify` reads each export back with the independent
runtime. Distances are means over standard deviations of logits in float32, the worst of eight
questions, to the quantized Megatron model: with inputs not rounded, and with rounded ones.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.workdir.store import read_json

RECIPES = {"tiny-llava": "quickstart", "tiny-vila": "quickstart_vila", "tiny-phi": "quickstart_phi"}
TENSORS = (1, 2, 4)
CUT = {4: ("int4_awq", "w4a8_awq")}  # ranks -> formats whose groups they would cut


def run(recipe: str, work: Path, names: Sequence[str], stages: str, *words: str) -> None:
    """Some stages of a recipe on one rank."""
    given = [f"workdir={work}", f"quantize.format=[{','.join(names)}]", f"stages=[{stages}]"]
    command = [sys.executable, "-m", "nemo_vlm_ptq", "run", recipe, *given, *words]
    subprocess.run([*command, "parallel.tensor=1"], check=True, stdout=sys.stderr)


def distances(work: Path, name: str) -> dict[str, tuple[float, float | None, float]]:
    """Target -> distance, that with rounded inputs, and what was allowed for the first."""
    found = read_json(work / name / "verify.json")["logits"]
    return {
        target: (one["mean"], one.get("mean_rounded"), one["tolerance_mean"])
        for target, one in found.items()
    }


def measure(recipe: str, work: Path, samples: int) -> list[list[str]]:
    """Rows (format, target, then cells) of a model."""
    cells: dict[tuple[str, str], dict[int, tuple[float, float | None, float]]] = {}
    size, every = f"calibration.samples={samples}", "export.targets=[trtllm,hf,compressed_tensors]"
    first = "import,observe,solve,export,verify"
    run(recipe, work, list(FORMATS), first, size, every, "export.tensor=1")
    for tensor in TENSORS:
        names = [name for name, row in FORMATS.items() if "trtllm" in row.targets]
        names = [name for name in names if name not in CUT.get(tensor, ())]
        if tensor > 1:
            for name in names:
                shutil.rmtree(work / name / "trtllm")
            cut = ("export.targets=[trtllm]", f"export.tensor={tensor}", size)
            run(recipe, work, names, "export,verify", *cut)
        for name in names if tensor > 1 else FORMATS:
            for target, found in distances(work, name).items():
                cells.setdefault((name, target), {})[tensor] = found
    order = list(FORMATS)
    keys = sorted(cells, key=lambda key: (order.index(key[0]), key[1] != "trtllm", key[1]))
    return [[*key, *_cells(cells[key])] for key in keys]


def _cells(found: dict[int, tuple[float, float | None, float]]) -> list[str]:
    """Tolerance, then a cell for every number of ranks."""
    texts = [f"{found[1][2]:.0e}"]
    for tensor in TENSORS:
        exact, rounded, _ = found.get(tensor, (None, None, None))
        text = "" if exact is None else f"{exact:.1e}"
        texts.append(text if rounded is None else f"{text}, {rounded:.1e}")
    return texts


def main() -> None:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description="distances of exports to the quantized model")
    parser.add_argument("models", nargs="*", default=list(RECIPES), metavar="MODEL")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--scratch", type=Path)
    chosen = parser.parse_args()
    head = ["model", "format", "target", "allowed", *(f"TP {tensor}" for tensor in TENSORS)]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for model in chosen.models:
        with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
            for row in measure(RECIPES[model], Path(scratch) / "work", chosen.samples):
                print("| " + " | ".join([model, *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
