"""Ranks that this package starts: where they listen, how they end, and what a signal does."""

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from bad_models import PATIENCE, PREFIX, ROOT, running, said_by, write_recipe
from models import free_ports

from nemo_vlm_ptq.distributed import launcher, spawn

SPAWN = "nemo_vlm_ptq.distributed.spawn"


def listening(process):
    """Addresses on which a process and its children listen."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            connections = one.net_connections(kind="inet")
        except psutil.Error:
            continue  # it has ended
        found |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.parametrize(
    "start",
    [("nemo_vlm_ptq",), (SPAWN, "2", "1", "0", "", "0")],
    ids=["command", "run.sh"],
)
def test_ranks_of_one_machine_listen_on_loopback_alone(tmp_path, start):
    recipe = write_recipe(
        tmp_path, parallel={"tensor": 2}, calibration={"data": "scenes", "samples": 64}
    )
    with running(tmp_path, *start, "run", recipe, "stages=[import, observe]") as command:
        process, found = psutil.Process(command.process.pid), set()
        while command.process.poll() is None:
            found |= listening(process)
            time.sleep(0.05)
        code, lines = command.end()
    assert code == 0, lines
    assert found and all(ipaddress.ip_address(one).is_loopback for one in found), found


def test_machine_zero_listens_on_the_address_that_the_user_names():
    (port,) = free_ports(1)
    with spawn.open_listener("127.0.0.2", port) as listener:
        assert listener.getsockname() == ("127.0.0.2", port)
        said = said_by(spawn.open_listener, "127.0.0.2", port)
    assert said.startswith(f"MASTER_ADDR=127.0.0.2 MASTER_PORT={port}: this machine cannot listen")
    for address in ("203.0.113.1", "no-such-host.invalid"):  # an address of another machine
        assert f"MASTER_ADDR={address} " in said_by(spawn.open_listener, address, port)
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", port))  # released


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Return a function that runs two ranks of a script instead of this package's command."""
    package = tmp_path / "nemo_vlm_ptq"
    package.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(spawn, "END_SECONDS", 1.0)
    monkeypatch.setattr(spawn, "LOST_PEER_SECONDS", 0.5)

    def run(script, *arguments):
        head = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
        (package / "__main__.py").write_text(head + script)
        (package / "__init__.py").touch()
        monkeypatch.chdir(tmp_path)  # where python -m looks first
        start = time.monotonic()
        failures = spawn.run_ranks(arguments, 2)
        failed = {rank: one.exitcode for rank, one in failures.items()}
        return failed, time.monotonic() - start

    return run


@pytest.mark.parametrize(
    ("script", "failed"),
    [
        ("", {}),
        ("sys.exit(3 * rank)", {1: 3}),
        ("time.sleep(600 * rank) or sys.exit(2)", {0: 2, 1: -15}),
        ("time.sleep(0.2 * rank) or sys.exit(1 + rank)", {0: 1, 1: 2}),  # it lost its peer first
        ("rank or os.kill(os.getpid(), 9); time.sleep(600)", {0: -9, 1: -15}),
        (
            "signal.signal(15, signal.SIG_IGN); rank or (time.sleep(1), sys.exit(1))\n"
            "time.sleep(600)",
            {0: 1, 1: -9},
        ),
    ],
)
def test_ranks_end_together_and_tell_how(ranks, script, failed):
    found, seconds = ranks(script)
    assert (found, seconds < 20) == (failed, True)


def test_ranks_get_their_numbers_and_the_arguments(ranks, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    script = f"told = ' '.join(map(os.environ.get, {names})) + str(sys.argv[1:])\n"
    script += "open(f'rank{rank}', 'w').write(told)"
    assert ranks(script, "run", "a=b c")[0] == {}
    for rank in (0, 1):
        told = (tmp_path / f"rank{rank}").read_text()
        assert told == f"{rank} {rank} 2 2 127.0.0.1['run', 'a=b c']"


def test_signals_that_are_ignored_stay_ignored(ranks, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert ranks("os.kill(os.getppid(), signal.SIGHUP)")[0] == {}
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_ranks_may_finish_their_work(ranks, tmp_path, number):
    script = (
        f"done = []; signal.signal({int(number)}, lambda *_: done.append(1))\n"
        "open(f'ready{rank}', 'w')\n"
        f"while rank == 0 and not os.path.exists('ready1'): time.sleep(0.01)\n"
        f"rank or os.kill(os.getppid(), {int(number)})\n"
        "while not done: time.sleep(0.01)\n"
        "time.sleep(1); open(f'saved{rank}', 'w')\n"
    )
    with pytest.raises(launcher.Stopped) as stopped:
        ranks(script)
    assert stopped.value.number == number
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_an_error_of_ranks_is_told_once_with_its_code(tmp_path):
    recipe = write_recipe(tmp_path)
    command = [sys.executable, "-m", SPAWN, "2", "1", "0", "", "0", "plan", recipe, "paralel=1"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    expected = f"{PREFIX}unknown recipe key 'paralel'; did you mean 'parallel'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def interrupted(folder, delay, *words, group=False):
    """Exit code and stderr of a command that gets SIGINT after some seconds."""
    settings = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_vlm_ptq", *map(str, words)],
            cwd=folder,
            env=os.environ | settings,
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
        )
        time.sleep(delay)
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        code = process.wait(timeout=PATIENCE)
    text = re.sub(r"^\[rank .*\n|^.*it/s.*\n", "", (folder / "err").read_text(), flags=re.M)
    return code, text


@pytest.mark.parametrize("delay", [0.5, 2.0, 5.0, 9.0])
@pytest.mark.parametrize("tensor", [1, 2])
def test_ctrl_c_ends_a_run_with_one_line_whatever_it_does(tmp_path, delay, tensor):
    """Imports, planning, start of ranks, their imports, loading of the model, observing."""
    recipe = write_recipe(
        tmp_path,
        parallel={"tensor": tensor},
        calibration={"data": "scenes", "samples": 2000, "micro_batch": 2},
    )
    begin = time.monotonic()
    code, text = interrupted(tmp_path, delay, "run", recipe, "stages=[import, observe]")
    assert time.monotonic() - begin - delay < 15
    told = (130, "nemo-vlm-ptq: stopped by SIGINT\n")
    assert (code, text) in (told, (-signal.SIGINT, ""))  # the latter while Python starts
    assert not list(tmp_path.glob("work/.lock/*.json"))
