"""An observe that was stopped goes on, on other ranks, and ends with an unbroken one's bytes."""

import contextlib
import signal
import sys
from pathlib import Path
from unittest import mock

import models
import pytest
from safetensors import safe_open

from nemo_vlm_ptq.calibrate.observe import loop as observing
from nemo_vlm_ptq.calibrate.observe.loop import ObserveOptions, ObserveSetup
from nemo_vlm_ptq.calibrate.observe.progress import read_progress
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.distributed.layout import strip_entries
from nemo_vlm_ptq.megatron.forward import collate
from nemo_vlm_ptq.workdir import store

LAYERS, SAMPLES = 4, 12
SETTINGS = {"data": "random"}
LAYER = 2 * 8 * sum(strip_entries(width, 0, 1) for width in (256, 256, 256, 512))
# (name, [(layout, what stops it or None, layers in memory or None)]); it stops after so many
# forwards of a rank, or (rank, forwards): by a signal that this rank gets in the last of them
STORIES = {
    "data-then-pipeline": [((1, 1, 2), 3, None), ((1, 2, 1), None, None)],
    "pipeline-then-data": [((1, 2, 1), 5, None), ((1, 1, 2), None, None)],
    "twice": [((1, 1, 2), 3, None), ((1, 2, 1), 3, None), ((1, 1, 2), None, None)],
    "second-pass": [((1, 1, 2), 8, 2), ((1, 2, 1), None, None)],
    "tensor": [((2, 1, 1), 5, None), ((2, 1, 1), None, None)],
    "tensor-then-data": [((2, 1, 1), 5, None), ((1, 1, 2), None, None)],
    "pipeline-then-tensor": [((1, 2, 1), 5, None), ((2, 1, 1), None, None)],
    "signal-data": [((1, 1, 2), (1, 4), None), ((1, 2, 1), None, None)],
    "signal-pipeline": [((1, 2, 1), (0, 3), None), ((1, 1, 2), None, None)],
    "signal-tensor": [((2, 1, 1), (1, 4), None), ((1, 1, 2), None, None)],
}


class StoppedError(Exception):
    """What a test does to a rank."""


def observed(own, model_folder, folder, stop, room):
    """Observe until a rank is stopped as a story says, saving after every two micro-batches."""
    from rank_parity import import_llava

    model, vision = import_llava(own, model_folder, to_observe=True)
    samples = models.to_samples(models.random_questions([40] * SAMPLES, range(0, 12, 3), seed=5))
    ran = []

    def count(samples):
        if len(ran) == stop:
            raise StoppedError
        ran.append(1)
        if (own.rank, len(ran)) == stop:
            signal.raise_signal(signal.SIGUSR1)
        return collate(samples)

    memory = None if room is None else room * LAYER + 1
    work, chunks = ObserveSetup(model, vision, own, models.ready), [[sample] for sample in samples]
    broken_off = contextlib.suppress(StoppedError, SystemExit)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which ends a rank once it has saved
    with mock.patch.object(observing, "collate", count), broken_off:
        observing.observe(
            work, chunks, folder, ObserveOptions(True, memory, save_every=2), SETTINGS
        )
    return len(ran)


def main():
    """Ranks: MODEL FOLDER STORY ..."""
    model, folder, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    acts = [(name, act) for name in names for act in STORIES[name]]
    for (name, act), own in zip(acts, models.each_layout([act[0] for _, act in acts]), strict=True):
        if own.rank == 0:
            (folder / name).mkdir(exist_ok=True)
        own.barrier()
        ran = own.gather(observed(own, model, folder / name, *act[1:]))
        if own.rank == 0:
            with (folder / f"{name}.ran").open("a") as file:
                file.write(f"{ran}\n")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Statistics of an unbroken run on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    with models.alone() as own:
        observed(own, tiny.float32, folder, None, None)
    return digests(folder)


@pytest.fixture(scope="module")
def stories(tiny, tmp_path_factory):
    """Folder of every story; two ranks, few launches (each has ports for six sessions)."""
    folder = tmp_path_factory.mktemp("stories")
    names = list(STORIES)
    for part in (names[:2], names[2:4], names[4:7], names[7:]):
        words = [*models.main_of("test_resume"), tiny.float32, folder, *part]
        code, _, err = models.launch(words, 2)
        assert code == 0, err[-3000:]
    return folder


def digests(folder):
    return {name: store.hash_file(folder / name) for name in map(layer_file, range(LAYERS))}


@pytest.mark.parametrize("name", STORIES)
def test_a_stopped_run_ends_with_the_bytes_of_an_unbroken_one_on_one_rank(stories, whole, name):
    assert digests(stories / name) == whole


@pytest.mark.parametrize(
    ("name", "ran"),
    [
        ("signal-data", ["[6, 5]", "[1, 1]"]),  # the other rank comes to its end first
        ("signal-pipeline", ["[5, 5]", "[4, 3]"]),  # two more are under way
        ("signal-tensor", ["[5, 5]", "[4, 3]"]),
    ],
)
def test_a_rank_with_a_signal_stops_all_and_no_micro_batch_is_lost(stories, name, ran):
    assert (stories / f"{name}.ran").read_text().split("\n")[:2] == ran


def test_what_was_saved_is_not_run_again(stories):
    first, second = (stories / "data-then-pipeline.ran").read_text().split("\n")[:2]
    assert first == "[3, 3]"  # saved after two of each
    assert second == "[8, 8]"  # 12 samples less the four saved


def test_nothing_is_left_of_the_saves(stories):
    for name in STORIES:
        assert not list((stories / name).glob("save-*"))


def test_progress_of_other_settings_is_thrown_away(tmp_path):
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


def test_saved_layers_say_which_samples_they_contain(tiny, tmp_path):
    with models.alone() as own:
        observed(own, tiny.float32, tmp_path, 7, None)
    progress = read_progress(tmp_path, SETTINGS)
    assert {layer: sorted(progress.ids(layer)) for layer in range(LAYERS)} == {
        layer: sorted(f"q{index}" for index in range(6)) for layer in range(LAYERS)
    }
    with safe_open(tmp_path / progress.saved[3].folder / layer_file(3), framework="pt") as file:
        assert int(file.get_tensor("linear_qkv.tokens").sum()) == 6 * 40
