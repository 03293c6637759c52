"""A rank that dies, or fails, in the middle ends the job soon, by name, and leaves no ruin."""

import json
import re
import signal
import time

import PIL.Image
import psutil
import pytest
from bad_models import PATIENCE, PREFIX, running, write_recipe

SOON = 60  # seconds from the death of a rank to the end of the command
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
STAGES = "stages=[import, observe]"


@pytest.fixture
def recipe(tmp_path):
    """Two tensor ranks that observe layer by layer, so that files of some are there early."""
    return write_recipe(
        tmp_path,
        parallel={"tensor": 2},
        quantize={"format": ["int4_awq"]},
        calibration={"samples": 96, "micro_batch": 2, "max_statistics_memory": "9MB"},
    )


def ranks(process):
    """Rank -> process, of the ranks that a command has started."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None and "nemo_vlm_ptq" in child.cmdline():
            found[int(rank)] = child
    return found


def wait_for(happened, process):
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, "ended before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.05)


def in_the_middle(folder):
    """Observe has written a first file and not its manifest."""
    work = folder / "work"
    return any(work.glob("statistics/*")) and (work / ".statistics.being-written").exists()


def kill_one(folder, process, number=signal.SIGKILL):
    """Seconds from a signal to rank 1 to the end of the command; no rank is left."""
    wait_for(lambda: in_the_middle(folder), process)
    alive = ranks(process)
    assert sorted(alive) == [0, 1]
    alive[1].send_signal(number)
    start = time.monotonic()
    process.wait(timeout=PATIENCE)
    seconds = time.monotonic() - start
    assert not [rank for rank, one in alive.items() if one.is_running()]
    return seconds


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own", "torchrun"])
def test_a_killed_rank_ends_the_job_soon_and_is_named(tmp_path, recipe, launcher):
    with running(tmp_path, *launcher, "nemo_vlm_ptq", "run", recipe, STAGES) as command:
        seconds = kill_one(tmp_path, command.process)
        code, lines = command.end()
    assert seconds < SOON and code != 0
    text = "\n".join(lines)
    if launcher:  # in torchrun's words
        assert re.search(r"failed \(exitcode: -9\) local_rank: 1 ", text)
    else:
        assert code == 1
        assert lines[-1] == (
            f"{PREFIX}rank 1 was ended by signal SIGKILL (out of memory?) "
            f"while {tmp_path}/work/statistics was being written"
        )
    work = tmp_path / "work"
    assert (work / "megatron" / "manifest.json").exists()
    assert not (work / "statistics" / "manifest.json").exists()
    with running(tmp_path, "nemo_vlm_ptq", "run", recipe, STAGES) as again:
        assert again.end()[0] == 0
    assert (work / "statistics" / "manifest.json").exists()
    assert not (work / ".statistics.being-written").exists()


def test_a_rank_that_fails_alone_ends_the_job_with_its_reason(tmp_path):
    """The other one has gone on, and waits for it in the sum over both."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for number in range(7):
        PIL.Image.new("RGB", (64, 64), (30 * number, 99, 0)).save(data / f"images/{number}.png")
    entries = {
        str(number): {"imageId": str(number), "question": "What?", "answer": "yes"}
        for number in range(8)
    }
    (data / "questions.json").write_text(json.dumps(entries))
    recipe = write_recipe(
        tmp_path,
        parallel={"tensor": 1, "data": 2},
        calibration={"data": str(data), "samples": 8, "micro_batch": 1},
    )
    with running(tmp_path, "nemo_vlm_ptq", "run", recipe, STAGES) as command:
        wait_for((tmp_path / "work" / "megatron" / "manifest.json").exists, command.process)
        start = time.monotonic()
        code, lines = command.end()
    assert time.monotonic() - start < SOON and code == 2
    assert lines[-1] == f"{PREFIX}{data}/images has no 7.jpg, .png, .jpeg or .webp"
    assert not [line for line in lines[:-1] if "Traceback" in line or "rror" in line]
    assert not (tmp_path / "work" / "statistics" / "manifest.json").exists()
