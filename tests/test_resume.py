"""An interrupted observe resumes on other ranks and in other windows, with the same bytes."""

import contextlib
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import models
import observing
import pytest
from safetensors import safe_open

from nemo_vlm_ptq.calibrate.observe import loop, micro_batches
from nemo_vlm_ptq.calibrate.observe.progress import read_progress
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.megatron.forward import forward
from nemo_vlm_ptq.workdir import store

LAYERS, SAMPLES = 4, 12
SETTINGS = {"data": "random"}
IN_MEMORY, IN_FILE = 1 << 30, 0  # bytes of the device's memory for hidden states


@dataclass(frozen=True)
class Run:
    """One run of observe.

    layout: (tensor, pipeline, data) sizes.
    window: layers of a window; None: all of a stage.
    fail_after: micro-batches of each rank, in all rounds, before it raises an error; None: it does
        not. A round has SAMPLES / data of them if no progress was made before.
    signal_at: (rank, forward pass) that receives a stop signal; None: no rank does.
    states_bytes: of hidden states in memory.
    """

    layout: tuple[int, int, int]
    window: int | None = None
    fail_after: int | None = None
    signal_at: tuple[int, int] | None = None
    states_bytes: int = IN_MEMORY


SCENARIOS = {
    "data-then-pipeline": [Run((1, 1, 2), fail_after=3), Run((1, 2, 1))],
    "pipeline-then-data": [Run((1, 2, 1), fail_after=5), Run((1, 1, 2))],
    "twice": [Run((1, 1, 2), fail_after=3), Run((1, 2, 1), fail_after=3), Run((1, 1, 2))],
    "tensor": [Run((2, 1, 1), fail_after=5), Run((2, 1, 1))],
    "tensor-then-data": [Run((2, 1, 1), fail_after=5), Run((1, 1, 2))],
    "pipeline-then-tensor": [Run((1, 2, 1), fail_after=5), Run((2, 1, 1))],
    "signal-data": [Run((1, 1, 2), signal_at=(1, 4)), Run((1, 2, 1))],
    "signal-pipeline": [Run((1, 2, 1), signal_at=(0, 3)), Run((1, 1, 2))],
    "signal-tensor": [Run((2, 1, 1), signal_at=(1, 4)), Run((1, 1, 2))],
    "first-window": [
        Run((1, 1, 2), window=2, fail_after=3),
        Run((1, 2, 1), window=1, states_bytes=IN_FILE),
    ],
    "second-window": [
        Run((1, 1, 2), window=2, fail_after=6 + 3, states_bytes=IN_FILE),
        Run((2, 1, 1), window=1),
    ],
    "between-windows": [Run((1, 1, 2), window=1, fail_after=2 * 6), Run((1, 2, 1), window=2)],
    "between-rounds": [Run((1, 2, 1), window=1, fail_after=2 * 12), Run((1, 1, 2), window=3)],
    "last-round": [
        Run((1, 2, 1), window=1, fail_after=2 * 12 + 5, states_bytes=IN_FILE),
        Run((2, 1, 1)),
    ],
    "three-windows": [
        Run((2, 1, 1), window=1, fail_after=12 + 5),
        Run((1, 1, 2), window=2, fail_after=4),
        Run((1, 2, 1), window=1),
    ],
    "signal-window": [
        Run((1, 1, 2), window=2, signal_at=(1, 6 + 2), states_bytes=IN_FILE),
        Run((1, 2, 1)),
    ],
    "signal-round": [Run((1, 2, 1), window=1, signal_at=(1, 3)), Run((1, 1, 2), window=3)],
}


class InjectedError(Exception):
    """Error that a test raises in a rank."""


def observe_until(parallel, model_folder, folder, run):
    """Observe until the run ends or is interrupted.

    Statistics are saved after every two micro-batches.

    Returns:
        The forward passes of this rank, and the layers that it handed on.
    """
    samples = models.to_samples(models.random_questions([40] * SAMPLES, range(0, 12, 3), seed=5))
    forward_passes, steps, layers = 0, 0, []
    run_micro_batches = loop.run_micro_batches

    def counting_forward(*arguments, **options):
        nonlocal forward_passes
        forward_passes += 1
        if (parallel.rank, forward_passes) == run.signal_at:
            signal.raise_signal(signal.SIGUSR1)
        return forward(*arguments, **options)

    def failing_micro_batches(*arguments):
        nonlocal steps
        completed = run_micro_batches(*arguments)
        while steps != run.fail_after:
            try:
                yield next(completed)
            except StopIteration:
                return
            steps += 1
        raise InjectedError

    options = observing.observe_options(
        save_every=2,
        device_states_bytes=run.states_bytes,
        consume=lambda layer, tensors, window: layers.append(layer),
    )
    setup = observing.observe_setup(parallel, observing.plan_of(model_folder), run.window)
    with (
        mock.patch.object(micro_batches, "forward", counting_forward),
        mock.patch.object(loop, "run_micro_batches", failing_micro_batches),
        contextlib.suppress(InjectedError, SystemExit),
        ignored(signal.SIGUSR1),  # it is raised again after the save
    ):
        loop.observe(setup, [[sample] for sample in samples], folder, options, SETTINGS)
    return forward_passes, layers


@contextlib.contextmanager
def ignored(number):
    """Ignore a signal inside the context."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def main():
    """Run scenarios on the launched ranks; arguments: MODEL FOLDER SCENARIO ..."""
    model, folder, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    runs = [(name, run) for name in names for run in SCENARIOS[name]]
    contexts = models.parallel_contexts([run.layout for _, run in runs])
    for (name, run), parallel in zip(runs, contexts, strict=True):
        if parallel.rank == 0:
            (folder / name).mkdir(exist_ok=True)
        parallel.barrier()
        counts, layers = zip(
            *parallel.all_gather(observe_until(parallel, model, folder / name, run)), strict=True
        )
        if parallel.rank == 0:
            with (folder / f"{name}.counts").open("a") as file:
                file.write(f"{[*counts]}\n")
            with (folder / f"{name}.layers").open("a") as file:
                file.write("".join(f"{layer}\n" for part in layers for layer in part))


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """Hashes of the statistics of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with models.single_rank() as parallel:
        observe_until(parallel, tiny.float32, folder, Run((1, 1, 1)))
    return hash_layers(folder)


@pytest.fixture(scope="module")
def scenarios(tiny, tmp_path_factory):
    """Folder with a folder per scenario."""
    folder = tmp_path_factory.mktemp("scenarios")
    arguments = [*models.main_command("test_resume"), tiny.float32, folder, *SCENARIOS]
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


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_layer_is_handed_on_once(scenarios, name):
    layers = (scenarios / f"{name}.layers").read_text().split()
    assert sorted(map(int, layers)) == list(range(LAYERS))


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


def test_finished_layers_only_make_hidden_states_again(scenarios):
    first, second = read_counts(scenarios, "between-windows")
    assert first == "[12, 12]"  # layers 0 and 1, 6 micro-batches of each rank
    assert second == "[12, 12]"  # stage 0 makes the states of layer 1; stage 1 has layers 2 and 3


def test_no_save_folder_and_no_hidden_states_remain_after_the_run(scenarios):
    for name in SCENARIOS:
        assert sorted(path.name for path in (scenarios / name).iterdir()) == [
            *map(layer_file, range(LAYERS)),
            store.PROGRESS,
        ]


def test_progress_with_other_settings_is_discarded(tmp_path):
    folder = tmp_path / "statistics"
    folder.mkdir()
    (folder / "old").touch()
    record = {"finished": [0], "held": {}, "saves": 1, "tokens": [9, 4]}
    store.write_progress(folder, SETTINGS, record)
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
