"""Calibrates tiny-llava on one rank, on two and on four in every shape, and compares all bytes.

    python benchmarks/layouts.py [--samples 128] [--scratch DIR]

All formats but w4a8_awq, whose groups of 128 are too wide for tensor 4 there; the model is in
bfloat16. Statistics, scales and exports must be the same: the exit code is 1 when they are not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.store import hash_file

NAMES = [name for name in FORMATS if name != "w4a8_awq"]
ONE = (1, 1, 1)
SHAPES = [
    (1, 1, 2), (1, 2, 1), (2, 1, 1),
    (1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1),
]  # fmt: skip
TARGETS = ("trtllm", "hf", "compressed_tensors")
Shape = tuple[int, int, int]


def calibrate(shape: Shape, work: Path, samples: int) -> None:
    """Import, observe, solve and export in a shape (tensor, pipeline, data)."""
    words = [f"workdir={work}", f"calibration.samples={samples}", "quantize.group_size=64"]
    words += [f"quantize.format=[{','.join(NAMES)}]", "stages=[import,observe,solve,export]"]
    words += [f"export.targets=[{','.join(TARGETS)}]", "export.tensor=1"]
    keys = ("tensor", "pipeline", "data")
    words += [f"parallel.{key}={size}" for key, size in zip(keys, shape, strict=True)]
    subprocess.run([sys.executable, "-m", "nemo_vlm_ptq", "run", "quickstart", *words], check=True)


def digests(work: Path) -> dict[str, str]:
    """File -> sha256 of statistics, of scales and of exported weights."""
    folders = [work / "statistics", *(work / name / "scales" for name in NAMES)]
    folders += [work / name / target for name in NAMES for target in TARGETS]
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
        calibrate(ONE, Path(folder) / "one", options.samples)
        expected = digests(Path(folder) / "one")
        print("| TP x PP x DP | files | other bytes than on one rank |\n| --- | --- | --- |")
        for shape in SHAPES:
            work = Path(folder) / "x".join(map(str, shape))
            calibrate(shape, work, options.samples)
            found = digests(work)
            others = [name for name in expected | found if found.get(name) != expected.get(name)]
            whole &= not others
            about = ", ".join(others) or "none"
            print(f"| {' x '.join(map(str, shape))} | {len(found)} | {about} |", flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
