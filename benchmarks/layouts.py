"""Calibrate tiny-llava in every parallel layout of 1, 2 and 4 ranks and compare all bytes.

    python benchmarks/layouts.py [--samples 128] [--window N] [--scratch DIR]

Runs all formats, int4 with group size 64; w4a8_awq requires group size 128, is solved from the kept
statistics, and is skipped at TP 4, which would split its groups. The model is in bfloat16. One rank
takes all layers at once; the other layouts take windows of N layers (default: auto). Statistics,
scales and exports must be the same in every layout: the exit code is 1 if they differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_vlm_ptq.distributed.layout import Layout
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.workdir.store import hash_file

GROUP_128_FORMAT = "w4a8_awq"
ROUNDS = (  # formats, group size, stages
    (
        [name for name in FORMATS if name != GROUP_128_FORMAT],
        64,
        "observe,solve,export",
    ),
    ([GROUP_128_FORMAT], 128, "solve,export"),
)
BASELINE_LAYOUT = Layout()
LAYOUTS = [
    Layout(tensor=tensor, pipeline=pipeline, data=data)
    for tensor, pipeline, data in (
        (1, 1, 2), (1, 2, 1), (2, 1, 1),
        (1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1),
    )
]  # fmt: skip
TARGETS = ("trtllm", "hf", "compressed_tensors")


def supported_rounds(layout: Layout) -> tuple[tuple[list[str], int, str], ...]:
    """Return the rounds whose groups the tensor size does not split."""
    return ROUNDS if layout.tensor < 4 else ROUNDS[:1]


def calibrate(layout: Layout, work: Path, samples: int, window: str) -> None:
    """Observe, solve and export in a layout, with windows of so many layers."""
    overrides = [
        f"workdir={work}",
        "calibration.data=scenes",
        f"calibration.samples={samples}",
        f"calibration.window={window}",
        "calibration.keep_statistics=true",
        f"export.targets=[{','.join(TARGETS)}]",
        "export.tensor=1",
        f"parallel.tensor={layout.tensor}",
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.data={layout.data}",
    ]
    command = [sys.executable, "-m", "nemo_vlm_ptq", "run", "quickstart", *overrides]
    for names, group_size, stages in supported_rounds(layout):
        formats = f"quantize.format=[{','.join(names)}]"
        arguments = [formats, f"quantize.group_size={group_size}", f"stages=[{stages}]"]
        subprocess.run([*command, *arguments], check=True)


def hash_outputs(work: Path, layout: Layout) -> dict[str, str]:
    """Return file -> sha256 of the statistics, and of scales and exports of a layout's formats."""
    formats = [name for names, *_ in supported_rounds(layout) for name in names]
    folders = [work / "statistics", *(work / name / "scales" for name in formats)]
    folders += [work / name / target for name in formats for target in TARGETS]
    files = sorted(path for folder in folders for path in folder.rglob("*.safetensors"))
    return {str(path.relative_to(work)): hash_file(path) for path in files}


def main() -> int:
    """Run every layout and print the table."""
    parser = argparse.ArgumentParser(description="compare the output bytes of parallel layouts")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", default="auto", metavar="N")
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    all_equal = True
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        baseline = Path(folder) / "baseline"
        calibrate(BASELINE_LAYOUT, baseline, args.samples, "auto")
        print("| TP x PP x DP | files | files that differ from one rank's |\n| --- | --- | --- |")
        for layout in LAYOUTS:
            name = f"{layout.tensor} x {layout.pipeline} x {layout.data}"
            work = Path(folder) / name.replace(" ", "")
            calibrate(layout, work, args.samples, args.window)
            expected, found = hash_outputs(baseline, layout), hash_outputs(work, layout)
            differing = [file for file in expected | found if found.get(file) != expected.get(file)]
            all_equal &= not differing
            print(f"| {name} | {len(found)} | {', '.join(differing) or 'none'} |", flush=True)
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
