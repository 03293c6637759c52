"""A rank that is killed or fails ends the run soon, with its name and no finished stage folder."""

import json
import re
import signal
import time

import PIL.Image
import psutil
import pytest
from bad_models import PATIENCE, PREFIX, running, write_recipe

MAX_SHUTDOWN_S = 60.0  # from the death of a rank to the end of the command
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
STAGES = "stages=[import, observe]"


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe with TP 2 and a window per layer, so that layer files exist early."""
    return write_recipe(
        tmp_path,
        parallel={"tensor": 2},
        quantize={"format": ["int4_awq"]},
        calibration={"data": "scenes", "samples": 96, "micro_batch": 2, "window": 1},
    )


def find_ranks(process):
    """Return rank -> process for the ranks that a command has started."""
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None and "nemo_vlm_ptq" in child.cmdline():
            ranks[int(rank)] = child
    return ranks


def wait_until(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "the command ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_observing(folder):
    """Return whether observe has written a first file, but not its manifest."""
    work = folder / "work"
    return any(work.glob("statistics/*")) and (work / ".statistics.being-written").exists()


def kill_rank_1(folder, process):
    """Kill rank 1 during observe, check that no rank remains, and return the seconds to the end."""
    wait_until(lambda: is_observing(folder), process)
    ranks = find_ranks(process)
    assert sorted(ranks) == [0, 1]
    ranks[1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    process.wait(timeout=PATIENCE)
    seconds = time.monotonic() - start
    assert not [rank for rank, child in ranks.items() if child.is_running()]
    return seconds


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own", "torchrun"])
def test_killed_rank_ends_the_run_and_is_reported(tmp_path, recipe, launcher):
    with running(tmp_path, *launcher, "nemo_vlm_ptq", "run", recipe, STAGES) as command:
        seconds = kill_rank_1(tmp_path, command.process)
        code, lines = command.end()
    assert seconds < MAX_SHUTDOWN_S and code != 0
    if launcher:  # torchrun's message
        assert re.search(r"failed \(exitcode: -9\) local_rank: 1 ", "\n".join(lines))
    else:
        assert code == 1
        assert lines[-1] == (
            f"{PREFIX}rank 1 was ended by signal SIGKILL (out of memory?) "
            f"while {tmp_path}/work/statistics was being written"
        )
    work = tmp_path / "work"
    assert (work / "megatron" / "manifest.json").exists()
    assert not (work / "statistics" / "manifest.json").exists()
    with running(tmp_path, "nemo_vlm_ptq", "run", recipe, STAGES) as command:
        assert command.end()[0] == 0
    assert (work / "statistics" / "manifest.json").exists()
    assert not (work / ".statistics.being-written").exists()


def test_failing_rank_ends_the_run_with_its_error(tmp_path):
    """The other rank does not fail; it waits in the reduction over data ranks."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for number in range(8):
        PIL.Image.new("RGB", (64, 64), (30 * number, 99, 0)).save(data / f"images/{number}.png")
    last = data / "images/7.png"  # its header is whole, as the plan finds
    last.write_bytes(last.read_bytes()[:-40])
    questions = {
        str(number): {"imageId": str(number), "question": "What?", "answer": "yes"}
        for number in range(8)
    }
    (data / "questions.json").write_text(json.dumps(questions))
    recipe = write_recipe(
        tmp_path,
        parallel={"tensor": 1, "data": 2},
        calibration={"data": str(data), "samples": 8, "micro_batch": 1},
    )
    with running(tmp_path, "nemo_vlm_ptq", "run", recipe, STAGES) as command:
        wait_until((tmp_path / "work" / "megatron" / "manifest.json").exists, command.process)
        start = time.monotonic()
        code, lines = command.end()
    assert time.monotonic() - start < MAX_SHUTDOWN_S and code == 2
    assert lines[-1].startswith(f"{PREFIX}{last} is not a readable image: ")
    assert not [line for line in lines[:-1] if "Traceback" in line or "rror" in line]
    assert not (tmp_path / "work" / "statistics" / "manifest.json").exists()
