"""What a sketch costs a search: the loss of the scales it chooses, against those of whole moments.

    python benchmarks/sketch.py [--rows 128,256,512,1024] [MODEL=DATA ...]

Observes every model with sketches and whole second moments, solves each layer from both, and
replays both results with the whole second moments. A linear's excess is the relative difference of
the two losses; that of the sum weighs linears by their loss. Prints a line per format and number of
rows, and the worst linear. The tiny models in assets/ with drawn scenes by default.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, with_errors
from nemo_vlm_ptq.calibrate.solve.smoothquant import input_noise
from nemo_vlm_ptq.calibrate.statistics import InputStatistics, assemble_layer, layer_file
from nemo_vlm_ptq.formats import FORMATS as ALL_FORMATS
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import make_recipe
from nemo_vlm_ptq.sources.decoder_weights import open_weights

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny-llava", "tiny-vila", "tiny-phi")
FORMATS = ("int4_awq", "w4a8_awq", "nvfp4_awq", "int8_sq")
GROUP_SIZE = 64


def main() -> None:
    """Run one process per model and number of rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=[f"{ROOT}/assets/{name}=scenes" for name in MODELS]
    )
    parser.add_argument("--rows", default="128,256,512,1024")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        (pair,) = arguments.models
        print(json.dumps(measure(*pair.split("=", 1), arguments.child)))
        return
    print(f"{'model':12} {'format':10} {'rows':>5} {'sum':>8} {'worst':>8}  linear")
    for pair in arguments.models:
        for rows in arguments.rows.split(","):
            command = [sys.executable, __file__, pair, "--child", rows]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for fmt, (total, worst, name) in json.loads(output.splitlines()[-1]).items():
                model = Path(pair.split("=", 1)[0]).name
                print(
                    f"{model:12} {fmt:10} {rows:>5} {total:8.2%} {worst:8.2%}  {name}", flush=True
                )


def measure(model: str, data: str, rows: int) -> dict[str, tuple[float, float, str]]:
    """Return format -> (excess of the sum, of the worst linear, its name)."""
    found: dict[str, list[tuple[float, float, str]]] = {fmt: [] for fmt in FORMATS}
    with tempfile.TemporaryDirectory() as work:
        tree = {
            "model": model,
            "workdir": work,
            "stages": ["observe"],
            "quantize": {"format": ["int4_awq", "nvfp4_svdquant"]},  # both kinds of statistics
            "calibration": {"data": data},
            "export": {"targets": ["hf"]},
        }
        observe(tree, rows)
        for layer, name, entries in compare(tree):
            found[name] += [(*losses, f"layer {layer} {linear}") for linear, losses in entries]
    result = {}
    for name, entries in found.items():
        worst = max(entries, key=lambda entry: entry[0] / entry[1])
        total = sum(entry[0] for entry in entries) / sum(entry[1] for entry in entries) - 1
        result[name] = (total, worst[0] / worst[1] - 1, worst[2])
    return result


def observe(tree: dict[str, Any], rows: int) -> None:
    """Observe a recipe in a process whose sketches have `rows` rows."""
    recipe = Path(tree["workdir"]) / "recipe.yaml"
    recipe.write_text(json.dumps(tree))
    code = (
        f"import nemo_vlm_ptq.constants as c; c.SKETCH_ROWS = {rows}; import sys; "
        f"sys.argv = ['x', 'run', {str(recipe)!r}]; from nemo_vlm_ptq.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=sys.stderr)


def compare(tree: dict[str, Any]) -> Iterator[tuple[int, str, list[tuple[str, list[float]]]]]:
    """Yield (layer, format, linear -> losses of the two choices, by sketch and by whole moment)."""
    plan = make_plan(make_recipe(tree))
    sizes, options = plan.decoder.sizes(1), SolveOptions(smoothquant_alpha="search")
    with open_weights(plan, torch.device("cpu")) as weights:
        for layer in range(plan.decoder.layers):
            tensors = load_file(Path(tree["workdir"]) / "statistics" / layer_file(layer))
            matrices = {k: weights.shard(name) for k, name in weight_names(layer).items()}
            sketch, whole = (assemble_layer(tensors, whole=flag) for flag in (False, True))
            for name in FORMATS:
                fmt = ALL_FORMATS[name]
                solved = [
                    solve_layer(matrices, statistics, fmt, GROUP_SIZE, sizes, options)
                    for statistics in (sketch, whole)
                ]
                yield (
                    layer,
                    name,
                    [
                        (key, [loss(scales[key], matrices[key], one, fmt) for scales in solved])
                        for key, one in whole.items()
                    ],
                )


def loss(
    scales: LinearScales, weight_OK: torch.Tensor, statistics: InputStatistics, fmt: QuantFormat
) -> float:
    """Return the mean over tokens of |dy|^2: from the weight, and from int8 inputs."""
    statistics = statistics.with_output_power(weight_OK)
    power = sum(
        statistics.shares[key] * float(value) for key, value in statistics.output_power.items()
    )
    error = with_errors(scales, weight_OK, statistics, fmt).error
    assert error is not None
    total = error**2 * power
    if fmt.activation == "int8" and scales.input_amax is not None:
        smooth_OK = divide_by_pre_quant_scale(weight_OK, scales.pre_quant_scale)
        total += float(input_noise(scales.input_amax) * smooth_OK.double().square().sum())
    return total


if __name__ == "__main__":
    main()
