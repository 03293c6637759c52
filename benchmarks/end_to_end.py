"""Time the whole command, from Enter to the last exported file, and what it writes and holds.

    python benchmarks/end_to_end.py prepare HOME [--model llava-1.5-7b-hf] [--layers N]
        [--samples 512]
    python benchmarks/end_to_end.py ceilings HOME
    python benchmarks/end_to_end.py run HOME CASE ... [--repeats 3] [--profile]

prepare writes a model of published sizes with random weights to HOME/model, and questions of about
30 to 450 tokens with photos of 640 x 480 to HOME/data. ceilings measures what the machine can do:
read the weights to the GPU, multiply matrices, write files. run times cases, separately started;
CASE is a name of CASES, or NAME:key=value,... . It prints a markdown table of medians; 1 GB is 10^9
bytes. "first" is the time from Enter to the first micro-batch, "end" from the last file to the
prompt. Put HOME where files are in memory to leave the disk out.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from random_model import write_model

ROOT = Path(__file__).resolve().parent.parent
CT = "export.targets=[compressed_tensors]"
CASES = {
    "fp8": ["quantize.format=fp8", "export.targets=[hf]"],
    "int4_awq": ["quantize.format=int4_awq", CT],
    "int4_awq window 1": ["quantize.format=int4_awq", CT, "calibration.window=1"],
    "five formats": ["quantize.format=[fp8,int8_sq,int4_awq,w4a8_awq,nvfp4]", CT],
}
MICRO_BATCH = 16
TEXT_TOKENS = 30, 450
COLUMNS = (
    "case",
    "whole, s",
    "first, s",
    "end, s",
    "GPU, GB",
    "host, GB",
    "written, GB",
    "results, GB",
)


def main() -> None:
    """Run one of the sub-commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    prepare_parser = commands.add_parser("prepare")
    prepare_parser.add_argument("home", type=Path)
    prepare_parser.add_argument("--model", default="llava-1.5-7b-hf")
    prepare_parser.add_argument("--layers", type=int)
    prepare_parser.add_argument("--samples", type=int, default=512)
    prepare_parser.set_defaults(run=lambda a: prepare(a.home, a.model, a.layers, a.samples))
    ceilings_parser = commands.add_parser("ceilings")
    ceilings_parser.add_argument("home", type=Path)
    ceilings_parser.set_defaults(run=lambda a: measure_ceilings(a.home))
    run_parser = commands.add_parser("run")
    run_parser.add_argument("home", type=Path)
    run_parser.add_argument("cases", nargs="+")
    run_parser.add_argument("--repeats", type=int, default=3)
    run_parser.add_argument("--profile", action="store_true")
    run_parser.set_defaults(run=lambda a: run_cases(a.home, a.cases, a.repeats, profile=a.profile))
    arguments = parser.parse_args()
    arguments.run(arguments)


def prepare(home: Path, model: str, layers: int | None, samples: int) -> None:
    """Write the model and the data; what exists is kept."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "model").exists():
        if (ROOT / "assets" / model).is_dir():
            (home / "model").symlink_to(ROOT / "assets" / model)
        else:
            write_model(model, home / "model", layers)
    if not (home / "data" / "questions.json").exists():
        write_data(home / "data", home / "model", samples)
    (home / "samples").write_text(str(samples))


def write_data(folder: Path, model: Path, samples: int) -> None:
    """Write questions whose lengths are spread evenly over TEXT_TOKENS, with an image each."""
    from nemo_vlm_ptq.data import scene_questions, scenes
    from nemo_vlm_ptq.families.folder_files import load_tokenizer

    tokenizer, dice = load_tokenizer(model), random.Random(0)
    pool = [one["question"] for one in scene_questions.questions("calibration", 50).values()]
    lengths = {text: len(tokenizer(" " + text)["input_ids"]) for text in pool}
    low, high = TEXT_TOKENS
    made = {}
    for i in range(samples):
        words, left = [dice.choice(pool)], low + (high - low) * i // max(1, samples - 1)
        while (left := left - lengths[words[-1]]) > 0:
            words.append(dice.choice(pool))
        image = f"calibration-{i:06d}"
        made[f"q{i:04d}"] = {"imageId": image, "question": " ".join(words), "answer": "red"}
    names = list(made)
    dice.shuffle(names)
    (folder / "images").mkdir(parents=True)

    def draw(name: str) -> None:
        image = made[name]["imageId"]
        path = folder / "images" / f"{image}.jpg"
        scenes.draw(image).resize((640, 480)).save(path, quality=90)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(draw, names))
    (folder / "questions.json").write_text(json.dumps({name: made[name] for name in names}))


def run_cases(home: Path, cases: list[str], repeats: int, *, profile: bool) -> None:
    """Run every case and print the table."""
    rows = []
    for case in cases:
        name, _, keys = case.partition(":")
        words = keys.split(",") if keys else CASES[name]
        runs = [run_case(home, words) for _ in range(repeats)]
        rows.append([name, *(statistics.median(run[key] for run in runs) for key in COLUMNS[1:])])
        print(
            f"{name}: {[round(run['whole, s'], 1) for run in runs]} s", file=sys.stderr, flush=True
        )
        if profile:
            for frames, seconds in list(runs[-1]["seconds"].items())[:25]:
                print(f"  {seconds:7.2f}  {frames}", file=sys.stderr)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name, *values in rows:
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |", flush=True)


def run_case(home: Path, words: list[str]) -> dict[str, Any]:
    """Run one command and return its figures by column."""
    work, output = home / "work", home / "timeline.json"
    shutil.rmtree(work, ignore_errors=True)
    recipe = {
        "model": str(home / "model"),
        "workdir": str(work),
        "stages": ["observe", "solve", "export"],
        "calibration": {
            "data": str(home / "data"),
            "samples": int((home / "samples").read_text()),
            "micro_batch": MICRO_BATCH,
        },
    }
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    script = Path(__file__).with_name("timeline.py")
    command = [sys.executable, str(script), str(output), "run", str(home / "recipe.yaml"), *words]
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, anonymous_memory(watched))
        time.sleep(0.2)
    whole = time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    found = json.loads(output.read_text())
    results = sum(path.stat().st_size for path in work.glob("*/*/**/*") if path.is_file())
    return {
        "whole, s": whole,
        "first, s": found["first_micro_batch"],
        "end, s": whole - found["last_write"],
        "GPU, GB": found["gpu_bytes"] / 1e9,
        "host, GB": peak / 1e9,
        "written, GB": sum(p.stat().st_size for p in work.rglob("*") if p.is_file()) / 1e9,
        "results, GB": results / 1e9,
        "seconds": found["seconds"],
    }


def anonymous_memory(process: psutil.Process) -> int:
    """Return the bytes of a process that no file backs."""
    try:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)
    except psutil.Error:
        return 0


def fastest(action: Callable[[], None], repeats: int = 3) -> float:
    """Return the seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.monotonic()
        action()
        times.append(time.monotonic() - start)
    return min(times)


def measure_ceilings(home: Path) -> None:
    """Print the rates of reading weights, of matrix products and of writing."""
    import torch
    from safetensors import safe_open

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = sorted((home / "model").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def read() -> None:
        for path in files:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        wait()

    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        for _ in range(20):
            a @ a
        wait()

    data = memoryview(bytearray(1 << 30))

    def write() -> None:
        (home / "written").write_bytes(data)

    print(f"read the weights, one thread: {size / fastest(read) / 1e9:.1f} GB/s")
    print(f"bfloat16 matrix product: {40 * side**3 / fastest(multiply) / 1e12:.0f} TFLOP/s")
    print(f"write, one thread: {len(data) / fastest(write) / 1e9:.1f} GB/s")
    (home / "written").unlink()


if __name__ == "__main__":
    main()
