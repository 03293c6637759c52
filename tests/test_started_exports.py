"""Files of exports that are written while later windows compute; sources that change meanwhile."""

import shutil

import pytest
from bad_models import TINY
from test_run_files import hashes, recipe_of, run

from nemo_vlm_ptq.calibrate.observe import loop
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.targets.writing import published
from nemo_vlm_ptq.targets.writing.published import PublishedFiles

STAGES = "stages=[observe,solve,export]"
FORMATS = "quantize.format=[fp8,int8_sq]"
TARGETS = "export.targets=[compressed_tensors,hf]"


@pytest.fixture
def written_early(monkeypatch):
    """Give every layer a file; return the numbers of those written before the last window."""
    monkeypatch.setattr(published, "count_files", lambda context: context.plan.decoder.layers)
    early, advance = [], PublishedFiles.advance

    def recording_advance(files, solved):
        waiting = set(files._waiting)
        advance(files, solved)
        if len(solved) < 4:
            early.extend(number for _, number in waiting - set(files._waiting))

    monkeypatch.setattr(PublishedFiles, "advance", recording_advance)
    return early


def test_files_are_started_once_their_layers_are_solved(tmp_path, written_early):
    for name in ("whole", "windows"):
        (tmp_path / name).mkdir()
    whole, windows = (recipe_of(tmp_path / name) for name in ("whole", "windows"))
    run(whole, STAGES, FORMATS, TARGETS)
    assert written_early == []
    run(windows, STAGES, FORMATS, TARGETS, "calibration.window=1")
    assert sorted(written_early) == sorted(3 * [0, 1, 2])  # int8_sq has one target
    expected, found = (hashes(tmp_path / name / "work") for name in ("whole", "windows"))
    assert found == expected


def test_finished_exports_are_not_started_again(tmp_path, written_early):
    recipe = recipe_of(tmp_path)
    run(recipe, STAGES, FORMATS, TARGETS, "calibration.window=1")
    written_early.clear()
    before = hashes(tmp_path / "work")
    run(recipe, STAGES, FORMATS, TARGETS, "calibration.window=1")
    assert written_early == [] and hashes(tmp_path / "work") == before


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    recipe, finish_window = recipe_of(tmp_path), loop._finish_window

    def finish_and_change(*args):
        finish_window(*args)
        (model / "model.safetensors").touch()

    monkeypatch.setattr(loop, "_finish_window", finish_and_change)
    with pytest.raises(UserError, match=r"model\.safetensors was changed while it was read"):
        run(recipe, STAGES, f"model={model}")
    assert not list((tmp_path / "work").rglob("manifest.json"))
    monkeypatch.undo()
    run(recipe, STAGES, f"model={model}")
