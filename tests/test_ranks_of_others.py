"""Ranks that torchrun and mpirun started, on one machine or two: the same bytes, the same ends."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import types

import psutil
import pytest
import scripts
from bad_models import PREFIX, write_recipe
from models import free_ports
from test_faults import SOON, in_the_middle, wait_for

from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.distributed import mpi
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.workdir.store import MANIFEST

WORDS = ("run", "recipe.yaml", "stages=[import, observe, solve, export]")
RANK = "OMPI_COMM_WORLD_RANK"
MPI = pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpirun and mpi4py (apt install openmpi-bin, pip install mpi4py)",
)


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    return scripts.make_venv(tmp_path_factory.mktemp("venv"))


def recipe(folder):
    """One format with every stage's own kind of file; two ranks share every layer."""
    return write_recipe(
        folder,
        parallel={"tensor": 2},
        quantize={"format": ["w4a8_awq"]},
        calibration={"samples": 8, "micro_batch": 2},
        export={"targets": ["trtllm", "hf"], "tensor": 2},
    )


def hashes(folder):
    """Stage's folder and file -> size and sha256."""
    work = folder / "work"
    return {
        f"{path.parent.relative_to(work)}/{name}": facts
        for path in sorted(work.rglob(MANIFEST))
        for name, facts in json.loads(path.read_text())["files"].items()
    }


@pytest.fixture(scope="module")
def expected(venv, tmp_path_factory):
    """What two ranks of torchrun leave."""
    folder = tmp_path_factory.mktemp("torchrun")
    recipe(folder)
    code, _, err = scripts.run("run.sh", venv, folder, *WORDS, GPUS_PER_NODE="2")
    assert code == 0, err[-3000:]
    found = hashes(folder)
    layer = layer_file(3)
    one_of_each = {"megatron/__1_0.distcp", f"statistics/{layer}",
                   f"w4a8_awq/scales/{layer}", "w4a8_awq/quantized/__1_0.distcp",
                   "w4a8_awq/trtllm/llm/rank1.safetensors", "w4a8_awq/hf/config.json"}  # fmt: skip
    assert one_of_each < set(found)
    return found


@MPI
def test_ranks_of_mpirun_leave_the_same_bytes(venv, tmp_path, expected):
    recipe(tmp_path)
    code, _, err = scripts.run("mpirun.sh", venv, tmp_path, *WORDS, GPUS_PER_NODE="2")
    assert code == 0, err[-3000:]
    assert hashes(tmp_path) == expected
    assert err.count("[rank 0] import: ") == 1


def test_ranks_on_two_machines_leave_the_same_bytes(venv, tmp_path, expected):
    recipe(tmp_path)
    settings = {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "localhost"}
    settings["MASTER_PORT"] = str(free_ports(1)[0])
    places = ({"NODE_RANK": "0"}, {"SLURM_NODEID": "1"})
    started = [
        scripts.start("run.sh", venv, tmp_path, *WORDS, **settings, **place) for place in places
    ]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], ended[0][0][-3000:] + ended[1][0][-3000:]
    assert hashes(tmp_path) == expected
    assert "[rank 0]" in ended[0][0] and "[rank 0]" not in ended[1][0]


@MPI
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("paralel.tensor=2",), "unknown recipe key 'paralel'; did you mean 'parallel'?"),
        (("parallel.data=3",), "parallel: tensor 2 x pipeline 1 x data 3"),
    ],
)
def test_a_refusal_ends_mpirun_with_2_and_its_reason(venv, tmp_path, words, said):
    recipe(tmp_path)
    code, _, err = scripts.run("mpirun.sh", venv, tmp_path, *WORDS, *words, GPUS_PER_NODE="2")
    assert code == 2
    assert f"{PREFIX}{said}" in err and "Traceback" not in err
    assert not (tmp_path / "work").exists()


def alive(process):
    """A process has not ended, be it that nobody has asked how it did."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@MPI
def test_a_killed_rank_of_mpirun_ends_the_job_soon(venv, tmp_path):
    recipe(tmp_path)
    words = (*WORDS, "calibration.samples=96", "calibration.max_statistics_memory=9MB")
    process = scripts.start("mpirun.sh", venv, tmp_path, *words, GPUS_PER_NODE="2")
    wait_for(lambda: in_the_middle(tmp_path), process)
    ranks = {
        child.environ()[RANK]: child
        for child in psutil.Process(process.pid).children(recursive=True)
        if RANK in child.environ() and "nemo_vlm_ptq" in child.cmdline()
    }
    ranks["1"].kill()
    _, err = process.communicate(timeout=SOON)
    assert process.returncode not in (0, 2, 3) and "signal 9 (Killed)" in err
    end = time.monotonic() + SOON
    while any(alive(one) for one in ranks.values()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not (tmp_path / "work" / "statistics" / MANIFEST).exists()


def fake_mpi(size):
    """mpi4py that sees so many ranks, this being the first."""
    place = types.SimpleNamespace(rank=0, size=size, bcast=lambda value: value, Free=lambda: None)
    place.Split_type = lambda _: place
    return types.SimpleNamespace(
        Init=lambda: None,
        Finalize=lambda: None,
        COMM_WORLD=place,
        COMM_TYPE_SHARED=0,
        Get_library_version=lambda: "MPICH Version: 4.1",
    )


def test_an_mpi_that_is_not_mpiruns_is_refused(monkeypatch):
    monkeypatch.setenv(mpi.WORLD_SIZE_VARIABLE, "2")
    monkeypatch.setattr(mpi, "_load", lambda: fake_mpi(1))
    said = (
        r"^mpirun started 2 ranks and mpi4py sees 1: .* \(MPICH Version: 4.1\); set MPI4PY_MPIABI"
    )
    with pytest.raises(UserError, match=said):
        mpi.adopt_mpi_ranks()


def test_a_rank_meets_the_others_where_the_user_says(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "to be put back")
    monkeypatch.setenv(mpi.WORLD_SIZE_VARIABLE, "2")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setattr(mpi, "_load", lambda: fake_mpi(2))
    mpi.adopt_mpi_ranks()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node7", "1234")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "2")


def test_without_mpi4py_a_rank_of_mpirun_says_what_to_install(tmp_path):
    recipe(tmp_path)
    script = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "sys.argv = ['nemo-vlm-ptq', 'plan', 'recipe.yaml']\n"
        "from nemo_vlm_ptq.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {mpi.WORLD_SIZE_VARIABLE: "2", "PYTHONPATH": str(scripts.ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"{PREFIX}ranks of mpirun need mpi4py, and it cannot be loaded (")
    assert done.stderr.endswith(
        "); pip install 'nemo-vlm-ptq[mpi]', or start ranks with torchrun\n"
    )
