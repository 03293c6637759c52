"""status and the commands of a workdir whose records, or which itself, is damaged or gone."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from bad_models import error_message, plan_error, running, said_by, write_recipe

from nemo_vlm_ptq import errors
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.status import format_status, read_status

DAMAGE = {
    "empty": b"",
    "cut": b'{"passed": tr',
    "list": b"[1, 2]",
    "number": b"3",
    "text": b'"a"',
    "null": b"null",
    "keys": b'{"a": 1}',
    "types": b'{"stage": 1, "settings": [], "files": 3, "facts": "x", "passed": [], "record": 7,'
    b' "sha256": {}, "stages": 5, "formats": [1], "held": 1}',
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
}


@pytest.fixture
def work(tmp_path):
    """A workdir with a folder of every stage and a failure."""
    for name in ("megatron", "statistics", "fp8/scales", "fp8/hf"):
        folder = tmp_path / name
        store.begin_stage(folder, {})
        (folder / "part").write_text("x")
        store.finish_stage(folder, stage="x", settings={}, files={}, facts={})
    store.write_json(tmp_path / "fp8" / "verify.json", {"passed": True, "settings": {}})
    failure = {"time": "now", "command": "run", "rank": 0, "node": "n", "job": "1", "message": "m"}
    (tmp_path / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    (tmp_path / "slurm").mkdir()
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["statistics", "fp8/scales", "fp8/hf"])
def test_a_damaged_manifest_is_told_as_such(work, name, damage):
    (work / name / "manifest.json").write_bytes(DAMAGE[damage])
    status = read_status(work)
    assert "damaged" in [status["stages"]["observe"], *status["formats"]["fp8"].values()]
    assert "damaged" in format_status(work, as_json=False)
    json.loads(format_status(work, as_json=True))
    said = said_by(store.is_finished, work / name, {})
    assert said.endswith(f"is yours: rm -r {work / name}")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_and_progress_are_no_traceback(work, damage):
    (work / "fp8" / "verify.json").write_bytes(DAMAGE[damage])
    (work / "statistics" / "manifest.json").unlink()
    (work / "statistics" / "progress.json").write_bytes(DAMAGE[damage])
    store.in_progress_marker(work / "statistics").touch()
    (work / "failures.jsonl").write_bytes(DAMAGE[damage] + b"\n" + DAMAGE[damage])
    status = read_status(work)
    assert status["formats"]["fp8"]["verify"] == "damaged"
    assert status["stages"]["observe"] == "in progress" and status["last_error"] is None
    format_status(work, as_json=False)
    assert store.read_progress(work / "statistics", {}) is None or damage == "types"


def test_the_failure_before_a_cut_line_is_told(work):
    (work / "statistics" / "manifest.json").unlink()
    with (work / "failures.jsonl").open("a") as file:
        file.write('{"time": "n')
    assert read_status(work)["last_error"]["message"] == "m"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["recipe.json", "jobs"])
def test_damaged_records_of_a_submission_are_named(work, name, damage):
    (work / "slurm" / name).write_bytes(DAMAGE[damage])
    if (name, damage) == ("jobs", "empty"):
        return
    said = error_message("status", work)
    assert said.startswith(f"{work}/slurm/{name} is damaged; ")


@pytest.mark.parametrize("facts", [{"fp8": {"targets": ["../x"]}}, {"../x": {"targets": []}}])
def test_unknown_names_in_the_records_of_a_submission_are_damage(work, facts):
    store.write_json(work / "slurm" / "recipe.json", {"stages": ["export"], "formats": facts})
    assert "recipe.json is damaged" in error_message("status", work)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/dev/null/x", "/dev/null is not a folder"),
        ("/dev/null", "/dev/null is not a folder"),
        ("file/work", "/file is not a folder"),
        ("dangling", "/dangling is not a folder"),
        ("loop", "/loop is not a folder"),
        ("x" * 300, ": File name too long"),
    ],
)
def test_a_workdir_that_cannot_be_is_rejected_by_plan(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    said = plan_error(tmp_path, plan_error.__defaults__[0], f"workdir={tmp_path / name}")
    assert said.startswith("workdir ") and reason in said


def test_an_error_of_a_removed_file_is_told_as_that(tmp_path):
    with pytest.raises(FileNotFoundError) as inside:
        (tmp_path / "a").read_text()
    with pytest.raises(FileNotFoundError) as outside:
        Path("/nowhere/a").read_text()
    assert errors.removed_path(inside.value, tmp_path) == tmp_path / "a"
    assert errors.removed_path(outside.value, tmp_path) is None
    assert errors.removed_path(KeyError("x"), tmp_path) is None
    assert errors.removed_path(KeyError("x"), tmp_path / "gone") == tmp_path / "gone"
    assert errors.disk_write_error(KeyError("x"), tmp_path / "gone") is None


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_workdir_that_is_removed_during_a_run_is_told_in_a_line(tmp_path, tensor):
    recipe = write_recipe(
        tmp_path,
        parallel={"tensor": tensor},
        calibration={"data": "scenes", "samples": 200, "micro_batch": 1, "save_every": 4},
    )
    work = tmp_path / "work"
    with running(tmp_path, "nemo_vlm_ptq", "run", recipe, "stages=[observe]") as command:
        while not list(work.glob("statistics/save-*")):
            assert command.process.poll() is None, command.end()
            time.sleep(0.02)
        os.rename(work, tmp_path / "removed")
        shutil.rmtree(tmp_path / "removed", ignore_errors=True)
        code, lines = command.end()
    assert code == 2, lines
    assert lines[-1].startswith(f"nemo-vlm-ptq: error: {work}"), lines
    assert "was removed while it was in use; run the same command again" in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
