"""A workdir has one owner at a time; what a run that ended left behind is recognized."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from bad_models import error_message, running, said_by, write_recipe

from nemo_vlm_ptq import cli
from nemo_vlm_ptq.distributed import launcher
from nemo_vlm_ptq.workdir import lock
from nemo_vlm_ptq.workdir.lock import LOCK_FOLDER, lock_workdir, locked_formats

HOLDER = (
    "import sys, time; from pathlib import Path\n"
    "from nemo_vlm_ptq.workdir.lock import lock_workdir\n"
    "with lock_workdir(Path(sys.argv[1]), 'run', sys.argv[2:]):\n"
    "    print('owned', flush=True); time.sleep(600)\n"
)


@pytest.fixture
def hold():
    """Return a function that starts another process which owns a workdir, or formats of it."""
    started = []

    def start(work, *formats):
        command = [sys.executable, "-c", HOLDER, str(work), *formats]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "owned\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def take(work, *formats):
    with lock_workdir(work, "run", formats):
        pass


def lock_files(work):
    return list((work / LOCK_FOLDER).glob("*.json"))


def change(work, **values):
    """Change what the only lock file of a workdir says."""
    (path,) = lock_files(work)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_second_run_is_told_who_owns_the_workdir(tmp_path, hold):
    process = hold(tmp_path / "work")
    said = said_by(take, tmp_path / "work")
    assert said.startswith(f"workdir {tmp_path}/work is in use by process {process.pid} on ")
    assert os.uname().nodename in said and ": run, since 2" in said and "stop it, or ch" in said
    assert len(lock_files(tmp_path / "work")) == 1


def test_a_released_lock_and_that_of_a_killed_process_are_free(tmp_path, hold):
    take(tmp_path)
    assert lock_files(tmp_path) == []
    process = hold(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it remains, as a zombie
    take(tmp_path)
    process.wait()
    assert not (tmp_path / LOCK_FOLDER).exists()


def test_a_pid_that_is_another_process_now_owns_nothing(tmp_path, hold):
    hold(tmp_path)
    change(tmp_path, start="1")
    take(tmp_path)


@pytest.mark.parametrize(
    ("held", "wanted", "refused"),
    [
        ((), (), True),
        ((), ("fp8",), True),
        (("fp8",), (), True),
        (("fp8",), ("fp8",), True),
        (("fp8", "int8_sq"), ("int8_sq", "nvfp4"), True),
        (("fp8",), ("nvfp4",), False),
    ],
)
def test_tasks_of_an_array_own_their_formats_side_by_side(tmp_path, hold, held, wanted, refused):
    hold(tmp_path, *held)
    if refused:
        said = said_by(take, tmp_path, *wanted)
        assert f"workdir {tmp_path}{' (' + ', '.join(held) + ')' if held else ''} is in" in said
    else:
        take(tmp_path, *wanted)
    assert len(lock_files(tmp_path)) == 1


@pytest.mark.parametrize(
    ("stages", "formats"),
    [
        (("solve", "export", "verify"), ["fp8"]),
        (("build",), ["fp8"]),
        (("import", "observe"), []),
        (("observe", "solve"), []),
        (("solve", "evaluate"), []),
        (("report",), []),
    ],
)
def test_stages_that_write_folders_of_a_format_lock_that_format(stages, formats):
    assert locked_formats(stages, ["fp8"]) == formats


@pytest.fixture
def elsewhere(tmp_path, hold, monkeypatch):
    """A workdir owned by a process of another host; times are short."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.1)
    hold(tmp_path)
    change(tmp_path, host="node7", pid=1, start="1", job=["41", "0"])
    return tmp_path


def test_a_run_on_another_host_that_shows_no_sign_is_over_after_a_while(elsewhere, capsys):
    start = time.monotonic()
    take(elsewhere)
    assert 1 <= time.monotonic() - start < 10
    assert capsys.readouterr().err.count("process 1 on node7, Slurm job 41: run, since") == 1


def test_a_run_on_another_host_that_touches_its_file_is_not_over(elsewhere):
    (path,) = lock_files(elsewhere)
    stop = threading.Event()

    def touch():
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        assert f"surely gone: rm {path})" in said_by(take, elsewhere)
    finally:
        stop.set()
        thread.join()


def test_a_requeued_slurm_job_takes_over_from_its_earlier_start_at_once(elsewhere, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 600)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    take(elsewhere)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0", '{"host": 1}', None])
def test_a_damaged_lock_is_over_after_a_while(tmp_path, hold, monkeypatch, text):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.3)
    hold(tmp_path)
    (path,) = lock_files(tmp_path)
    owner = json.loads(path.read_text()) | {"formats": 3, "job": "x"}
    path.write_text(json.dumps(owner) if text is None else text)
    take(tmp_path)


def test_an_owner_keeps_its_file_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.05)
    with lock_workdir(tmp_path, "run"):
        (path,) = lock_files(tmp_path)
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before


def enter(work, entered, ready):
    ready.wait()
    try:
        with lock_workdir(Path(work), "run"):
            entered.put(os.getpid())
            time.sleep(2)
    except Exception:
        entered.put(None)


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path, hold):
    process = hold(tmp_path)
    process.kill()
    process.wait()
    context = multiprocessing.get_context("fork")
    entered, ready = context.Queue(), context.Event()
    runs = [context.Process(target=enter, args=(tmp_path, entered, ready)) for _ in range(6)]
    for run in runs:
        run.start()
    ready.set()
    owners = [entered.get(timeout=60) for _ in runs]
    assert len([owner for owner in owners if owner is not None]) == 1
    for run in runs:
        run.join()


def test_commands_that_only_read_need_no_lock(tmp_path, hold, capsys):
    hold(tmp_path / "work")
    recipe = write_recipe(tmp_path)
    for words in (("plan", recipe), ("status", tmp_path / "work")):
        with (
            mock.patch.object(sys, "argv", ["x", *map(str, words)]),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
        assert not end.value.code
    assert "is in use by process" in error_message("run", recipe)
    assert "is in use by process" in error_message("solve", recipe)


def children(process):
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes):
    return [one for one in processes if one.is_running() and one.status() != "zombie"]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_rank(process):
    try:
        return "RANK" in process.environ() and "nemo_vlm_ptq" in process.cmdline()
    except psutil.Error:
        return False


@pytest.mark.parametrize("words", [(), ("torch.distributed.run", "--nproc-per-node", "2", "-m")])
def test_ranks_end_with_a_killed_launcher_and_the_next_run_goes_on(tmp_path, words):
    recipe = write_recipe(
        tmp_path, parallel={"tensor": 2}, calibration={"data": "scenes", "samples": 400}
    )
    run = (*words, "nemo_vlm_ptq", "run", recipe, "stages=[import, observe]")
    with running(tmp_path, *run) as command:
        wait_for((tmp_path / "work" / ".statistics.being-written").exists)
        assert "is in use by process" in error_message("run", recipe)
        ranks = [child for child in children(command.process) if is_rank(child)]
        assert len(ranks) == 2
        command.process.send_signal(signal.SIGKILL)
        wait_for(lambda: not alive(ranks), 5)
        command.process.wait()
    take(tmp_path / "work")


def test_a_rank_whose_launcher_has_ended_before_it_asks_ends_at_once():
    script = "from nemo_vlm_ptq.distributed import launcher; launcher.follow_launcher(); print(1)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {launcher.PARENT_VARIABLE: "1"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (137, b"")


def test_a_workdir_that_is_no_folder_is_rejected_in_a_line(tmp_path):
    assert said_by(take, Path("/dev/null/x")).startswith("workdir /dev/null/x cannot be written")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    said_by(take, tmp_path / "link")
