"""Measure how far the logits of exported checkpoints are from those of the quantized model.

    python benchmarks/exports.py [tiny-llava tiny-vila tiny-phi] [--samples 64] [--scratch DIR]

Exports the small models in every format to every target. Each model is calibrated once.
TensorRT-LLM checkpoints are sharded over 1, 2 and 4 ranks; int4 formats over 1 and 2, because the
group size allows no more in models this small. `verify` reads each export back with the independent
reference model. Distances are means over standard deviations of float32 logits, the worst of eight
questions, against the quantized Megatron model: without activation rounding, then with it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.registry import supported_targets
from nemo_vlm_ptq.workdir.store import read_json

RECIPES = {"tiny-llava": "quickstart", "tiny-vila": "quickstart_vila", "tiny-phi": "quickstart_phi"}
TARGETS = ("trtllm", "hf", "compressed_tensors")
TENSOR_SIZES = (1, 2, 4)
INDIVISIBLE = {4: ("int4_awq", "w4a8_awq")}  # tensor size -> formats whose groups it would split


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Mean distance of an export's logits from those of the quantized Megatron model.

    exact: without activation rounding.
    rounded: with activation rounding; None for formats that do not quantize activations.
    tolerance: largest value of `exact` that verify accepts.
    """

    exact: float
    rounded: float | None
    tolerance: float


def run(recipe: str, work: Path, formats: Sequence[str], stages: str, *overrides: str) -> None:
    """Run some stages of a recipe on one rank."""
    overrides = (
        f"workdir={work}",
        f"quantize.format=[{','.join(formats)}]",
        f"stages=[{stages}]",
        "calibration.data=scenes",
        "parallel.tensor=1",
        *overrides,
    )
    command = [sys.executable, "-m", "nemo_vlm_ptq", "run", recipe, *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)


def read_distances(work: Path, fmt: str) -> dict[str, Distance]:
    """Return target -> distance from verify.json of a format."""
    logits = read_json(work / fmt / "verify.json")["logits"]
    return {
        target: Distance(
            exact=entry["mean"],
            rounded=entry.get("mean_rounded"),
            tolerance=entry["tolerance_mean"],
        )
        for target, entry in logits.items()
    }


def measure(recipe: str, work: Path, samples: int) -> list[list[str]]:
    """Export and verify one model in every format; return the rows of the table."""
    distances: dict[tuple[str, str], dict[int, Distance]] = {}
    samples_override = f"calibration.samples={samples}"
    targets = f"export.targets=[{','.join(TARGETS)}]"
    stages = "observe,solve,export,verify"
    run(recipe, work, list(FORMATS), stages, samples_override, targets, "export.tensor=1")
    for tensor in TENSOR_SIZES:
        names = [name for name, fmt in FORMATS.items() if "trtllm" in supported_targets(fmt)]
        names = [name for name in names if name not in INDIVISIBLE.get(tensor, ())]
        if tensor > 1:
            for name in names:
                shutil.rmtree(work / name / "trtllm")
            sharded = ("export.targets=[trtllm]", f"export.tensor={tensor}", samples_override)
            run(recipe, work, names, "export,verify", *sharded)
        for name in names if tensor > 1 else FORMATS:
            for target, distance in read_distances(work, name).items():
                distances.setdefault((name, target), {})[tensor] = distance
    order = list(FORMATS)
    keys = sorted(distances, key=lambda key: (order.index(key[0]), key[1] != "trtllm", key[1]))
    return [[*key, *_cells(distances[key])] for key in keys]


def _cells(by_tensor_size: dict[int, Distance]) -> list[str]:
    """Return the tolerance, then one cell per tensor size."""
    cells = [f"{by_tensor_size[1].tolerance:.0e}"]
    for tensor in TENSOR_SIZES:
        distance = by_tensor_size.get(tensor)
        cell = "" if distance is None else f"{distance.exact:.1e}"
        if distance is not None and distance.rounded is not None:
            cell = f"{cell}, {distance.rounded:.1e}"
        cells.append(cell)
    return cells


def main() -> None:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description="logit distances of exports")
    parser.add_argument("models", nargs="*", default=list(RECIPES), metavar="MODEL")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    head = ["model", "format", "target", "tolerance", *(f"TP {size}" for size in TENSOR_SIZES)]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for model in args.models:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            for row in measure(RECIPES[model], Path(scratch) / "work", args.samples):
                print("| " + " | ".join([model, *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
