"""Calibrates tiny-llava on one rank and on four in every shape, and prints what differs.

    python benchmarks/layouts.py [--samples 128] [--scratch DIR]

All formats but w4a8_awq, whose groups of 128 are too wide for tensor 4 there; the model is in
bfloat16. Data and pipeline ranks must leave the same bytes: the exit code is 1 when they do not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.scales import divide
from nemo_vlm_ptq.calibrate.solve import load_scales, weight_names
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.numerics import encode
from nemo_vlm_ptq.store import hash_file, read_json

NAMES = [name for name in FORMATS if name != "w4a8_awq"]
ONE, SAME, TENSOR = (1, 1, 1), [(1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2)], [(2, 1, 1), (4, 1, 1)]
LAYERS = range(4)
Shape = tuple[int, int, int]


def calibrate(shape: Shape, work: Path, samples: int) -> None:
    """Import, observe and solve in a shape (tensor, pipeline, data)."""
    words = [f"workdir={work}", f"calibration.samples={samples}", "quantize.group_size=64"]
    words += [f"quantize.format=[{','.join(NAMES)}]", "stages=[import,observe,solve]"]
    keys = ("tensor", "pipeline", "data")
    words += [f"parallel.{key}={size}" for key, size in zip(keys, shape, strict=True)]
    command = [sys.executable, "-m", "nemo_vlm_ptq", "run", "quickstart", *words, "export.tensor=1"]
    subprocess.run(command, check=True)


def same_bytes(own: Path, other: Path) -> bool:
    """Statistics and the scales of every format."""
    parts = ["statistics", *(f"{name}/scales" for name in NAMES)]
    files = [f"{part}/{layer_file(layer)}" for part in parts for layer in LAYERS]
    return all(hash_file(own / name) == hash_file(other / name) for name in files)


def differences(name: str, own: Path, other: Path) -> tuple[int, float]:
    """(linears with another alpha, share of scales that differ) of a format."""
    alphas = [
        {(line["layer"], line["linear"]): line["alpha"] for line in manifest["facts"]["layers"]}
        for manifest in (read_json(work / name / "scales/manifest.json") for work in (own, other))
    ]
    differ = total = 0
    for layer in LAYERS:
        found, expected = (
            load_file(work / name / "scales" / layer_file(layer)) for work in (own, other)
        )
        differ += sum(int((found[key] != tensor).sum()) for key, tensor in expected.items())
        total += sum(tensor.numel() for tensor in expected.values())
    return sum(alphas[0][key] != alpha for key, alpha in alphas[1].items()), differ / total


def equal_codes(own: Path, other: Path) -> float:
    """Share of int4_awq's codes that are equal."""
    reader, equal, total = LayerReader(other / "megatron"), 0, 0
    for layer in LAYERS:
        both = [load_scales(work / "int4_awq/scales", layer) for work in (own, other)]
        names = weight_names(layer)
        for linear, weight in zip(names, reader.read(names.values()).values(), strict=True):
            mine, theirs = (
                encode(divide(weight, one[linear].prequant), one[linear].weight_amax, "int4")
                for one in both
            )
            equal += int(torch.eq(mine, theirs).sum())
            total += mine.numel()
    return equal / total


def main() -> int:
    """Run every shape and print the tables."""
    parser = argparse.ArgumentParser(description="compares layouts")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        works = {shape: Path(folder) / "x".join(map(str, shape)) for shape in (ONE, *SAME, *TENSOR)}
        for shape, work in works.items():
            calibrate(shape, work, options.samples)
        equal = {shape: same_bytes(works[shape], works[ONE]) for shape in SAME}
        print("| TP x PP x DP | bytes of TP 1 x PP 1 x DP 1 |\n| --- | --- |")
        for shape, same in equal.items():
            print(f"| {' x '.join(map(str, shape))} | {'same' if same else 'OTHERS'} |")
        print("\n| format | TP | other alphas, of 16 | other scales |\n| --- | --- | --- | --- |")
        for name in NAMES:
            for shape in TENSOR:
                others, share = differences(name, works[shape], works[ONE])
                print(f"| {name} | {shape[0]} | {others} | {100 * share:.2f} % |")
        for shape in TENSOR:
            share = equal_codes(works[shape], works[ONE])
            print(f"\nint4_awq, TP {shape[0]}: {100 * share:.3f} % of the codes are equal", end="")
        print()
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
