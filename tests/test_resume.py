"""An interrupted observe resumes on other ranks and writes the bytes of an uninterrupted run."""

import contextlib
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import models
import pytest
from safetensors import safe_open

from nemo_vlm_ptq.calibrate.observe import loop
from nemo_vlm_ptq.calibrate.observe.loop import ObserveOptions, ObserveSetup
from nemo_vlm_ptq.calibrate.observe.progress import read_progress
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.distributed.moment_strips import strip_numel
from nemo_vlm_ptq.megatron.forward import collate
from nemo_vlm_ptq.workdir import store

LAYERS, SAMPLES = 4, 12
SETTINGS = {"data": "random"}
LAYER_BYTES = 2 * 8 * sum(strip_numel(width, 0, 1) for width in (256, 256, 256, 512))


@dataclass(frozen=True)
class Run:
    """One run of observe.

    layout: (tensor, pipeline, data) sizes.
    fail_after: forward passes of each rank before it raises an error; None: it does not.
    signal_at: (rank, forward pass) that receives a stop signal; None: no rank does.
    max_layers: layers whose second moments fit in memory; None: all.
    """

    layout: tuple[int, int, int]
    fail_after: int | None = None
    signal_at: tuple[int, int] | None = None
    max_layers: int | None = None


SCENARIOS = {
    "data-then-pipeline": [Run((1, 1, 2), fail_after=3), Run((1, 2, 1))],
    "pipeline-then-data": [Run((1, 2, 1), fail_after=5), Run((1, 1, 2))],
    "twice": [Run((1, 1, 2), fail_after=3), Run((1, 2, 1), fail_after=3), Run((1, 1, 2))],
    "second-pass": [Run((1, 1, 2), fail_after=8, max_layers=2), Run((1, 2, 1))],
    "tensor": [Run((2, 1, 1), fail_after=5), Run((2, 1, 1))],
    "tensor-then-data": [Run((2, 1, 1), fail_after=5), Run((1, 1, 2))],
    "pipeline-then-tensor": [Run((1, 2, 1), fail_after=5), Run((2, 1, 1))],
    "signal-data": [Run((1, 1, 2), signal_at=(1, 4)), Run((1, 2, 1))],
    "signal-pipeline": [Run((1, 2, 1), signal_at=(0, 3)), Run((1, 1, 2))],
    "signal-tensor": [Run((2, 1, 1), signal_at=(1, 4)), Run((1, 1, 2))],
}


class InjectedError(Exception):
    """Error that a test raises in a rank."""


def observe_until(parallel, model_folder, folder, run):
    """Observe until the run ends or is interrupted; return the forward passes of this rank.

    Statistics are saved after every two micro-batches.
    """
    from rank_parity import import_llava

    model, vision = import_llava(parallel, model_folder, for_calibration=True)
    samples = models.to_samples(models.random_questions([40] * SAMPLES, range(0, 12, 3), seed=5))
    forward_passes = 0

    def counting_collate(samples):
        nonlocal forward_passes
        if forward_passes == run.fail_after:
            raise InjectedError
        forward_passes += 1
        if (parallel.rank, forward_passes) == run.signal_at:
            signal.raise_signal(signal.SIGUSR1)
        return collate(samples)

    options = ObserveOptions(
        second_moments=True,
        max_memory=None if run.max_layers is None else run.max_layers * LAYER_BYTES + 1,
        save_every=2,
    )
    setup = ObserveSetup(model, vision, parallel, models.identity_preprocess)
    interrupted = contextlib.suppress(InjectedError, SystemExit)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is raised again after the save
    with mock.patch.object(loop, "collate", counting_collate), interrupted:
        loop.observe(setup, [[sample] for sample in samples], folder, options, SETTINGS)
    return forward_passes


def main():
    """Run scenarios on the launched ranks; arguments: MODEL FOLDER SCENARIO ..."""
    model, folder, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    runs = [(name, run) for name in names for run in SCENARIOS[name]]
    contexts = models.parallel_contexts([run.layout for _, run in runs])
    for (name, run), parallel in zip(runs, contexts, strict=True):
        if parallel.rank == 0:
            (folder / name).mkdir(exist_ok=True)
        parallel.barrier()
        counts = parallel.all_gather(observe_until(parallel, model, folder / name, run))
        if parallel.rank == 0:
            with (folder / f"{name}.counts").open("a") as file:
                file.write(f"{counts}\n")


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """Hashes of the statistics of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with models.single_rank() as parallel:
        observe_until(parallel, tiny.float32, folder, Run((1, 1, 1)))
    return hash_layers(folder)


@pytest.fixture(scope="module")
def scenarios(tiny, tmp_path_factory):
    """Folder with a folder per scenario; each launch has ports for six parallel contexts."""
    folder = tmp_path_factory.mktemp("scenarios")
    names = list(SCENARIOS)
    for part in (names[:2], names[2:4], names[4:7], names[7:]):
        arguments = [*models.main_command("test_resume"), tiny.float32, folder, *part]
        code, _, err = models.launch_ranks(arguments, 2)
        assert code == 0, err[-3000:]
    return folder


def hash_layers(folder):
    return {name: store.hash_file(folder / name) for name in map(layer_file, range(LAYERS))}


def read_counts(scenarios, name):
    """Return the lines of forward passes per rank of the first two runs."""
    return (scenarios / f"{name}.counts").read_text().split("\n")[:2]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_run(scenarios, uninterrupted, name):
    assert hash_layers(scenarios / name) == uninterrupted


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("signal-data", ["[6, 5]", "[1, 1]"]),  # the other replica runs out of data first
        ("signal-pipeline", ["[5, 5]", "[4, 3]"]),  # two more micro-batches are in flight
        ("signal-tensor", ["[5, 5]", "[4, 3]"]),
    ],
)
def test_a_signal_to_one_rank_stops_all_ranks_without_losing_a_micro_batch(scenarios, name, counts):
    assert read_counts(scenarios, name) == counts


def test_saved_samples_are_not_run_again(scenarios):
    first, second = read_counts(scenarios, "data-then-pipeline")
    assert first == "[3, 3]"  # saved after two of each rank
    assert second == "[8, 8]"  # 12 samples minus the four saved


def test_no_save_folder_remains_after_the_run(scenarios):
    for name in SCENARIOS:
        assert not list((scenarios / name).glob("save-*"))


def test_progress_with_other_settings_is_discarded(tmp_path):
    folder = tmp_path / "statistics"
    folder.mkdir()
    (folder / "old").touch()
    store.write_progress(folder, SETTINGS, {"finished": [0], "held": {}, "saves": 1})
    assert read_progress(folder, SETTINGS).finished == {0}
    assert read_progress(folder, {"data": "others"}).finished == set()
    store.begin_stage(folder, SETTINGS)
    assert (folder / "old").exists()
    store.begin_stage(folder, {"data": "others"})
    assert not list(folder.iterdir())


def test_progress_records_the_samples_of_each_layer(tiny, tmp_path):
    with models.single_rank() as parallel:
        observe_until(parallel, tiny.float32, tmp_path, Run((1, 1, 1), fail_after=7))
    progress = read_progress(tmp_path, SETTINGS)
    assert {layer: sorted(progress.sample_ids(layer)) for layer in range(LAYERS)} == {
        layer: sorted(f"q{index}" for index in range(6)) for layer in range(LAYERS)
    }
    with safe_open(tmp_path / progress.saved[3].folder / layer_file(3), framework="pt") as file:
        assert int(file.get_tensor("linear_qkv.tokens").sum()) == 6 * 40
