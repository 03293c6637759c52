"""Calibrates tiny-llava on one rank, on two and on four in every shape, and compares all bytes.

    python benchmarks/layouts.py [--samples 128] [--scratch DIR]

All formats, int4 in groups of 64; w4a8_awq, whose groups must be of 128, is left out of tensor 4,
which would cut them. The model is in bfloat16. Statistics, scales and exports must be the same: the
exit code is 1 when they are not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.workdir.store import hash_file

WIDE = "w4a8_awq"
ROUNDS = (  # formats, group, stages
    ([name for name in FORMATS if name != WIDE], 64, "import,observe,solve,export"),
    ([WIDE], 128, "solve,export"),
)
ONE = (1, 1, 1)
SHAPES = [
    (1, 1, 2), (1, 2, 1), (2, 1, 1),
    (1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1),
]  # fmt: skip
TARGETS = ("trtllm", "hf", "compressed_tensors")
Shape = tuple[int, int, int]


def rounds(shape: Shape) -> tuple[tuple[list[str], int, str], ...]:
    """What a shape (tensor, pipeline, data) has room for."""
    return ROUNDS if shape[0] < 4 else ROUNDS[:1]


def calibrate(shape: Shape, work: Path, samples: int) -> None:
    """Import, observe, solve and export in a shape."""
    words = [f"workdir={work}", f"calibration.samples={samples}"]
    words += [f"export.targets=[{','.join(TARGETS)}]", "export.tensor=1"]
    keys = ("tensor", "pipeline", "data")
    words += [f"parallel.{key}={size}" for key, size in zip(keys, shape, strict=True)]
    command = [sys.executable, "-m", "nemo_vlm_ptq", "run", "quickstart", *words]
    for names, group, stages in rounds(shape):
        own = [f"quantize.format=[{','.join(names)}]", f"quantize.group_size={group}"]
        subprocess.run([*command, *own, f"stages=[{stages}]"], check=True)


def digests(work: Path, shape: Shape) -> dict[str, str]:
    """File -> sha256 of statistics, and of scales and weights of a shape's formats."""
    formats = [name for names, *_ in rounds(shape) for name in names]
    folders = [work / "statistics", *(work / name / "scales" for name in formats)]
    folders += [work / name / target for name in formats for target in TARGETS]
    files = sorted(path for folder in folders for path in folder.rglob("*.safetensors"))
    return {str(path.relative_to(work)): hash_file(path) for path in files}


def main() -> int:
    """Run every shape and print the table."""
    parser = argparse.ArgumentParser(description="compares layouts")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    whole = True
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        one = Path(folder) / "one"
        calibrate(ONE, one, options.samples)
        print("| TP x PP x DP | files | other bytes than on one rank |\n| --- | --- | --- |")
        for shape in SHAPES:
            work = Path(folder) / "x".join(map(str, shape))
            calibrate(shape, work, options.samples)
            expected, found = digests(one, shape), digests(work, shape)
            others = [name for name in expected | found if found.get(name) != expected.get(name)]
            whole &= not others
            about = ", ".join(others) or "none"
            print(f"| {' x '.join(map(str, shape))} | {len(found)} | {about} |", flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
