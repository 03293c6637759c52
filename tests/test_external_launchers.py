"""Ranks started by torchrun or mpirun, on one or two machines: identical files and exit codes."""

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
from test_rank_failures import MAX_SHUTDOWN_S, is_observing, wait_until

from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.distributed import mpi
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.workdir.store import MANIFEST

ARGS = ("run", "recipe.yaml", "stages=[import, observe, solve, export]")
RANK_VARIABLE = "OMPI_COMM_WORLD_RANK"
MPI = pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="requires mpirun and mpi4py (apt install openmpi-bin, pip install mpi4py)",
)


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    return scripts.make_venv(tmp_path_factory.mktemp("venv"))


def recipe(folder):
    """Write a recipe whose stages write every type of file, with two tensor-parallel ranks."""
    return write_recipe(
        folder,
        parallel={"tensor": 2},
        quantize={"format": ["w4a8_awq"]},
        calibration={"data": "scenes", "samples": 8, "micro_batch": 2, "keep_statistics": True},
        export={"targets": ["trtllm", "hf", "megatron"], "tensor": 2},
    )


def hashes(folder):
    """Return stage folder and file -> size and sha256, from the manifests."""
    work = folder / "work"
    return {
        f"{path.parent.relative_to(work)}/{name}": facts
        for path in sorted(work.rglob(MANIFEST))
        for name, facts in json.loads(path.read_text())["files"].items()
    }


@pytest.fixture(scope="module")
def expected(venv, tmp_path_factory):
    """Files that two ranks started by torchrun write."""
    folder = tmp_path_factory.mktemp("torchrun")
    recipe(folder)
    code, _, err = scripts.run("run.sh", venv, folder, *ARGS, GPUS_PER_NODE="2")
    assert code == 0, err[-3000:]
    found = hashes(folder)
    layer = layer_file(3)
    required = {"megatron/__1_0.distcp", f"statistics/{layer}",
                f"w4a8_awq/scales/{layer}", "w4a8_awq/quantized/__1_0.distcp",
                "w4a8_awq/trtllm/llm/rank1.safetensors", "w4a8_awq/hf/config.json"}  # fmt: skip
    assert required < set(found)
    return found


@MPI
def test_mpirun_ranks_write_identical_files(venv, tmp_path, expected):
    recipe(tmp_path)
    code, _, err = scripts.run("mpirun.sh", venv, tmp_path, *ARGS, GPUS_PER_NODE="2")
    assert code == 0, err[-3000:]
    assert hashes(tmp_path) == expected
    assert err.count("[rank 0] import: ") == 1


def test_ranks_on_two_machines_write_identical_files(venv, tmp_path, expected):
    recipe(tmp_path)
    settings = {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "localhost"}
    settings["MASTER_PORT"] = str(free_ports(1)[0])
    node_variables = ({"NODE_RANK": "0"}, {"SLURM_NODEID": "1"})
    processes = [
        scripts.start("run.sh", venv, tmp_path, *ARGS, **settings, **node)
        for node in node_variables
    ]
    results = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert [code for _, code in results] == [0, 0], results[0][0][-3000:] + results[1][0][-3000:]
    assert hashes(tmp_path) == expected
    assert "[rank 0]" in results[0][0] and "[rank 0]" not in results[1][0]


@MPI
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("paralel.tensor=2",), "unknown recipe key 'paralel'; did you mean 'parallel'?"),
        (("parallel.data=3",), "parallel: tensor 2 x pipeline 1 x data 3"),
    ],
)
def test_mpirun_exits_with_2_and_the_message_of_a_user_error(venv, tmp_path, overrides, message):
    recipe(tmp_path)
    code, _, err = scripts.run("mpirun.sh", venv, tmp_path, *ARGS, *overrides, GPUS_PER_NODE="2")
    assert code == 2
    assert f"{PREFIX}{message}" in err and "Traceback" not in err
    assert not (tmp_path / "work").exists()


def is_alive(process):
    """Return whether a process is running; zombies are not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@MPI
def test_a_killed_mpirun_rank_ends_the_job(venv, tmp_path):
    recipe(tmp_path)
    args = (*ARGS, "calibration.samples=96", "calibration.window=1")
    process = scripts.start("mpirun.sh", venv, tmp_path, *args, GPUS_PER_NODE="2")
    wait_until(lambda: is_observing(tmp_path), process)
    ranks = {
        child.environ()[RANK_VARIABLE]: child
        for child in psutil.Process(process.pid).children(recursive=True)
        if RANK_VARIABLE in child.environ() and "nemo_vlm_ptq" in child.cmdline()
    }
    ranks["1"].kill()
    _, err = process.communicate(timeout=MAX_SHUTDOWN_S)
    assert process.returncode not in (0, 2, 3) and "signal 9 (Killed)" in err
    end = time.monotonic() + MAX_SHUTDOWN_S
    while any(is_alive(process) for process in ranks.values()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not (tmp_path / "work" / "statistics" / MANIFEST).exists()


def fake_mpi(size):
    """Create a fake mpi4py.MPI that reports rank 0 of a world of `size` ranks."""
    communicator = types.SimpleNamespace(
        rank=0, size=size, bcast=lambda value: value, Free=lambda: None
    )
    communicator.Split_type = lambda _: communicator
    return types.SimpleNamespace(
        Init=lambda: None,
        Finalize=lambda: None,
        COMM_WORLD=communicator,
        COMM_TYPE_SHARED=0,
        Get_library_version=lambda: "MPICH Version: 4.1",
    )


def test_an_mpi_other_than_mpiruns_is_rejected(monkeypatch):
    monkeypatch.setenv(mpi.WORLD_SIZE_VARIABLE, "2")
    monkeypatch.setattr(mpi, "_import_mpi", lambda: fake_mpi(1))
    message = (
        r"^mpirun started 2 ranks but mpi4py sees 1: .* \(MPICH Version: 4.1\); set MPI4PY_MPIABI"
    )
    with pytest.raises(UserError, match=message):
        mpi.set_env_from_mpi()


def test_mpirun_ranks_use_the_given_master_address(monkeypatch):
    changed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", mpi.STORE_VARIABLE)
    for key in (*changed, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(key, "restored after the test")
    port = str(free_ports(1)[0])
    monkeypatch.setenv(mpi.WORLD_SIZE_VARIABLE, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(mpi, "_import_mpi", lambda: fake_mpi(2))
    mpi.set_env_from_mpi()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.2", port)
    os.close(int(os.environ[mpi.STORE_VARIABLE]))
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "2")


def test_a_missing_mpi4py_is_reported_with_the_package_to_install(tmp_path):
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
    assert done.stderr.startswith(
        f"{PREFIX}ranks started by mpirun need mpi4py, which cannot be imported ("
    )
    assert done.stderr.endswith(
        "); pip install 'nemo-vlm-ptq[mpi]', or start the ranks with torchrun\n"
    )
