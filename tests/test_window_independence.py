"""Statistics, scales and exports have the same bytes for any window of layers, in any layout."""

import math
import os
import sys
from pathlib import Path

import models
import pytest

from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.workdir.store import read_manifest

# (TP, PP, DP) -> windows; all layers at once on two ranks are in test_layout_independence.py.
WINDOWS = {
    (1, 1, 1): ("auto", 1, 3),
    (2, 1, 1): (1, 2),
    (1, 2, 1): (1,),
    (1, 1, 2): (1, 2),
    (2, 2, 1): (1,),
    (2, 1, 2): (2,),
    (1, 2, 2): (1,),
}
RUNS = [(layout, window) for layout, windows in WINDOWS.items() for window in windows]
ONE_RANK = (1, 1, 1)
FORMAT_NAMES, TARGET = ("fp8", "int4_awq"), "compressed_tensors"


def workdir(folder, layout, window):
    return folder / f"{'x'.join(map(str, layout))}-{window}"


def run_windows(parallel, folder, layout):
    """Observe, solve and export with each window of a layout; data ranks have 3 and 2 samples."""
    for window in WINDOWS[layout]:
        recipe = Recipe(
            model=str(models.TINY_LLAVA),
            workdir=str(workdir(folder, layout, window)),
            parallel=dict(zip(("tensor", "pipeline", "data"), layout, strict=True)),
            quantize={"format": FORMAT_NAMES},
            calibration={
                "data": "scenes",
                "samples": 5,
                "micro_batch": 1,
                "window": window,
                "keep_statistics": True,
            },
            export={"targets": (TARGET,)},
        )
        context = RunContext(plan=make_plan(recipe), parallel=parallel)
        run_stages(context, ("observe", "solve", "export"))


def main():
    """Run the layouts of the launched ranks; argument: FOLDER."""
    folder = Path(sys.argv[1])
    layouts = [one for one in WINDOWS if math.prod(one) == int(os.environ["WORLD_SIZE"])]
    for layout, parallel in zip(layouts, models.parallel_contexts(layouts), strict=True):
        run_windows(parallel, folder, layout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a work folder for each run."""
    folder = tmp_path_factory.mktemp("windows")
    with models.single_rank() as parallel:
        run_windows(parallel, folder, ONE_RANK)
    for ranks in sorted({math.prod(layout) for layout in WINDOWS} - {1}):
        arguments = [*models.main_command("test_window_independence"), folder]
        code, _, err = models.launch_ranks(arguments, ranks)
        assert code == 0, err[-3000:]
    return folder


def written(work):
    """Return part of a work folder -> file -> size and sha256."""
    parts = ["statistics"]
    for name in FORMAT_NAMES:
        parts += [f"{name}/scales", f"{name}/{TARGET}"]
    return {part: read_manifest(work / part)["files"] for part in parts}


@pytest.mark.parametrize(("layout", "window"), RUNS)
def test_files_have_the_same_bytes(folder, layout, window):
    found = written(workdir(folder, layout, window))
    assert found == written(workdir(folder, ONE_RANK, "auto"))
    layers = {layer_file(layer) for layer in range(4)}
    assert set(found["statistics"]) == set(found["fp8/scales"]) == layers


@pytest.mark.parametrize(("layout", "window"), RUNS)
def test_the_manifest_tells_the_number_of_windows_of_a_stage(folder, layout, window):
    facts = read_manifest(workdir(folder, layout, window) / "statistics")["facts"]
    layers = 4 // layout[1]
    assert facts["windows"] == (1 if window == "auto" else -(-layers // window))
    ids = [sample_id for rank_ids in facts["ids_per_rank"] for sample_id in rank_ids]
    assert len(facts["ids_per_rank"]) == layout[2] and len(ids) == len(set(ids)) == 5
