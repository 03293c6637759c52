"""A single rank is the process of the command: its errors and signals end it like other ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from unittest import mock

import psutil
import pytest
from bad_models import PREFIX, TINY, copy_model, damage, running, write_recipe
from test_cli import call
from test_rank_failures import wait_until

from nemo_vlm_ptq import commands
from nemo_vlm_ptq.distributed import launcher
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.stages import worker
from nemo_vlm_ptq.workdir.status import FAILURES_FILE, read_status
from nemo_vlm_ptq.workdir.store import in_progress_marker, read_manifest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DOWN = "language_model.model.layers.2.mlp.down_proj.weight"


def recipe_of(folder, model=TINY, **calibration):
    calibration = {"samples": 8, "micro_batch": 2, "window": 1} | calibration
    return write_recipe(
        folder,
        model,
        stages=["observe", "solve", "export"],
        parallel={"tensor": 1, "data": 1},
        quantize={"format": ["int4_awq"]},
        calibration=calibration,
        export={"targets": ["compressed_tensors"]},
    )


def solved_layers(folder):
    return sorted((folder / "work").glob("int4_awq/scales/layer_*"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Signal -> (exit code, lines on stderr, folder) of a run that got it after its first layer."""
    folders = {number: tmp_path_factory.mktemp(number.name) for number in SIGNALS}
    ends = {}
    with contextlib.ExitStack() as stack:
        started = {
            number: stack.enter_context(
                running(folder, "nemo_vlm_ptq", "run", recipe_of(folder, samples=256))
            )
            for number, folder in folders.items()
        }
        for number, command in started.items():
            wait_until(lambda command=command: solved_layers(command.folder), command.process)
            assert not psutil.Process(command.process.pid).children()
            command.process.send_signal(number)
        for number, command in started.items():
            ends[number] = (*command.end(), command.folder)
    return ends


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_command_with_one_line_and_its_code(stopped, number):
    code, lines, folder = stopped[number]
    assert code == 128 + number
    assert lines[-1] == f"nemo-vlm-ptq: stopped by {number.name}"
    assert not [line for line in lines if "Traceback" in line or "error" in line]
    assert not list(folder.rglob("hidden_states.*"))
    assert not (folder / "work" / "statistics" / "manifest.json").exists()
    assert not (folder / "work" / FAILURES_FILE).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_observe_saves_the_progress_first(stopped, number):
    _, lines, folder = stopped[number]
    requested = [line for line in lines if "stop requested" in line]
    if requested:
        (line,) = requested
        assert line.endswith(" samples are saved; run the same command again to resume")
    else:  # it came between two windows: all that is done is a finished window
        finished = json.loads((folder / "work/statistics/progress.json").read_text())["record"]
        assert len(finished["finished"]) == len(solved_layers(folder)) > 0


def test_a_stopped_run_goes_on_with_other_ranks_and_windows_and_writes_the_same_bytes(
    stopped, tmp_path
):
    _, _, folder = stopped[signal.SIGTERM]
    finished = json.loads((folder / "work/statistics/progress.json").read_text())["record"]
    before = {path: path.stat().st_mtime_ns for path in solved_layers(folder)}
    assert 0 < len(finished["finished"]) <= len(before) < 4
    changes = ("parallel.data=2", "calibration.window=2")
    with running(folder, "nemo_vlm_ptq", "run", folder / "recipe.yaml", *changes) as command:
        assert command.end()[0] == 0
    kept = solved_layers(folder)[: len(finished["finished"])]
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    recipe = recipe_of(tmp_path, samples=256, window=4)
    assert commands.run_command("run", str(recipe), []) == 0
    for part in ("scales", "compressed_tensors"):
        found, expected = (
            read_manifest(home / "work" / "int4_awq" / part) for home in (folder, tmp_path)
        )
        assert found["files"] == expected["files"]


def test_a_user_error_is_one_line_and_status_shows_it(tmp_path, capsys):
    model = damage(
        copy_model(tmp_path / "model"), lambda tensors: tensors[DOWN].fill_(float("nan"))
    )
    work, message = tmp_path / "work", f"tensor {DOWN} holds NaN or Inf"
    code, _, err = call(capsys, "run", recipe_of(tmp_path, model))
    lines = err.splitlines()
    assert code == 2 and lines[-1] == f"{PREFIX}{message}"
    assert not [line for line in lines[:-1] if "Traceback" in line or "rror" in line]
    (failure,) = map(json.loads, (work / FAILURES_FILE).read_text().splitlines())
    assert (failure["command"], failure["rank"], failure["message"]) == ("run", 0, message)
    assert read_status(work)["last_error"] == failure
    assert not list(work.rglob("manifest.json"))


def test_the_last_error_is_that_of_the_last_run(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    plan = mock.Mock(recipe=mock.Mock(workdir=str(tmp_path / "work")))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for pid, message in ((1, "first"), (2, "second")):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        monkeypatch.setattr(worker, "run_worker", mock.Mock(side_effect=UserError(message)))
        with pytest.raises(UserError):
            commands._run_here("run", plan, {})
    assert read_status(tmp_path / "work")["last_error"]["message"] == "second"


def test_an_error_before_the_ranks_start_is_not_recorded(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    code, _, err = call(capsys, "run", recipe_of(tmp_path), "calibration.window=9")
    assert code == 2 and err.count("\n") == 1
    assert not (tmp_path / "work" / FAILURES_FILE).exists()


def test_a_bug_ends_with_its_traceback_and_one_line_with_the_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "work" / "int4_awq" / "scales"

    def fail(*_):
        folder.parent.mkdir(parents=True)
        in_progress_marker(folder).touch()
        raise KeyError("first\nsecond")

    monkeypatch.setattr(worker, "run_stages", fail)
    code, _, err = call(capsys, "run", recipe_of(tmp_path))
    lines = err.splitlines()
    assert code == 1
    assert lines[0].startswith("Traceback") and "raise KeyError" in "".join(lines)
    assert lines[-1] == (
        f"{PREFIX}rank 0 failed: KeyError: 'first\\nsecond' while {folder} was being written"
    )
    (failure,) = map(json.loads, (tmp_path / "work" / FAILURES_FILE).read_text().splitlines())
    assert failure["message"] == "KeyError: 'first\\nsecond'"


def test_a_folder_that_an_earlier_run_left_is_not_named(tmp_path, capsys):
    in_progress_marker(tmp_path / "statistics").touch()
    assert launcher.run_here(lambda: 1 // 0, tmp_path) == 1
    line = f"{PREFIX}rank 0 failed: ZeroDivisionError: integer division or modulo by zero"
    assert capsys.readouterr().err.splitlines()[-1].startswith(line.partition(": int")[0])


@pytest.mark.parametrize("error", [UserError("of the user"), VerificationError("differs")])
def test_an_expected_error_is_left_to_the_command(tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        launcher.run_here(mock.Mock(side_effect=error), tmp_path)


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launcher.run_here(lambda: signal.raise_signal(signal.SIGHUP) or 0, tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_in_a_finalizer_is_not_lost(tmp_path, number):
    """Python drops what a finalizer raises."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from nemo_vlm_ptq.distributed.launcher import run_here\n"
        "from nemo_vlm_ptq.utils.own_files import own\n"
        "class Freed:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        time.sleep(0.1)\n"
        "def work():\n"
        "    Path('owned').touch()\n"
        "    own(Path('owned'))\n"
        "    Freed()\n"
        "    return 0\n"
        "sys.exit(run_here(work, Path('work')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 128 + number
    assert done.stderr.decode() == f"nemo-vlm-ptq: stopped by {number.name}\n"
    assert not (tmp_path / "owned").exists()
