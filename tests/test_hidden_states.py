"""Hidden states between windows come back as they were put, from memory, the host or a file."""

import errno
import os
import shutil
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from bad_models import PREFIX, TINY, error_message, write_recipe
from test_cli import call

from nemo_vlm_ptq import commands
from nemo_vlm_ptq.calibrate.observe.hidden_states import HiddenStates, open_hidden_states
from nemo_vlm_ptq.workdir import store

CPU = torch.device("cpu")
BYTES = 5 * 2 * 8 * 2  # of one micro-batch in bfloat16
# `nemo_vlm_ptq.stages` exports a function of the same name, which hides the module.
observe_stage = import_module("nemo_vlm_ptq.stages.observe")


def random_states(index, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(index)
    return torch.randn(5, 2, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("device", "host", "in_file"),
    [(9, 0, 0), (0, 9, 0), (0, 0, 6), (2, 2, 2), (2, 0, 4), (0, 3, 3)],
)
def test_states_come_back_in_any_order_and_may_be_replaced(tmp_path, dtype, device, host, in_file):
    """Sizes are in micro-batches; what fits into no memory lies in the file."""
    path, size = tmp_path / "states", BYTES * dtype.itemsize // 2
    states = HiddenStates(CPU, device * size, host * size, path)
    for index in range(6):
        states.put(index, random_states(index, dtype))
    assert (path.stat().st_size if path.exists() else 0) == in_file * size
    for index in (3, 0, 5, 1, 4, 2):
        found = states.get(index)
        assert found.dtype == dtype and torch.equal(found, random_states(index, dtype))
    for index in (5, 2, 0):
        states.put(index, random_states(10 + index, dtype))
    for index in range(6):
        expected = random_states(10 + index if index in (5, 2, 0) else index, dtype)
        assert torch.equal(states.get(index), expected)
    assert (path.stat().st_size if path.exists() else 0) == in_file * size
    states.close()
    assert not path.exists()


@pytest.mark.parametrize("device_bytes", [BYTES, 0])
def test_what_was_put_does_not_follow_later_changes_of_the_tensor(tmp_path, device_bytes):
    states = HiddenStates(CPU, device_bytes, 0, tmp_path / "states")
    tensor = random_states(0)
    states.put(0, tensor)
    tensor.zero_()
    assert torch.equal(states.get(0), random_states(0))
    states.close()


def test_views_are_stored_as_contiguous_tensors(tmp_path):
    states = HiddenStates(CPU, 0, 0, tmp_path / "states")
    states.put(0, random_states(0).transpose(0, 1))
    assert torch.equal(states.get(0), random_states(0).transpose(0, 1))
    states.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_states_of_a_gpu_stand_in_pinned_memory_of_the_host(tmp_path):
    device = torch.device("cuda", 0)
    with open_hidden_states(device, BYTES, 3 * BYTES, tmp_path / "states") as states:
        for index in range(4):
            states.put(index, random_states(index).to(device))
        assert [states._in_memory[index].is_pinned() for index in range(4)] == [
            False, True, True, True,
        ]  # fmt: skip
        for index in range(4):
            assert torch.equal(states.get(index).cpu(), random_states(index))
            assert states.get(index).is_cuda


def test_the_file_is_removed_when_the_run_fails(tmp_path):
    path = tmp_path / "states"
    with (
        pytest.raises(KeyError),
        open_hidden_states(CPU, 0, 0, path) as states,
    ):
        states.put(0, random_states(0))
        assert path.exists()
        raise KeyError
    assert not path.exists()


def test_short_writes_and_reads_are_continued(tmp_path):
    """The system may write or read less than was asked for."""
    write, read = os.pwrite, os.preadv
    states = HiddenStates(CPU, 0, 0, tmp_path / "states")
    with (
        mock.patch.object(os, "pwrite", lambda fd, data, at: write(fd, data[:7], at)),
        mock.patch.object(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:5]], at)),
    ):
        for index in range(2):
            states.put(index, random_states(index))
        for index in range(2):
            assert torch.equal(states.get(index), random_states(index))
    states.close()


def test_a_truncated_file_is_not_read(tmp_path):
    states = HiddenStates(CPU, 0, 0, tmp_path / "states")
    states.put(0, random_states(0))
    os.truncate(tmp_path / "states", BYTES - 1)
    with pytest.raises(RuntimeError, match="was truncated while it was in use"):
        states.get(0)
    states.close()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with windows between which hidden states do not stand in memory."""
    plan_windows = observe_stage.plan_windows

    def plan_file(*arguments):
        return replace(plan_windows(*arguments), states_on_device=0)

    monkeypatch.setattr(observe_stage, "plan_windows", plan_file)
    return write_recipe(
        tmp_path,
        TINY,
        stages=["observe", "solve", "export"],
        parallel={"tensor": 1, "data": 1},
        calibration={"samples": 8, "micro_batch": 2, "window": 1},
        export={"targets": ["compressed_tensors"]},
    )


def files_of(folder):
    """Return name -> sha256 of the files of scales and of the export."""
    return {
        str(path.relative_to(folder)): store.hash_file(path)
        for part in ("scales", "compressed_tensors")
        for path in sorted((folder / "fp8" / part).glob("*.safetensors"))
    }


def test_a_disk_that_fills_up_with_hidden_states_is_reported_and_nothing_looks_finished(
    tmp_path, recipe, monkeypatch, capsys
):
    work, pwrite, written = tmp_path / "work", os.pwrite, []

    def fill(descriptor, data, offset):
        if len(written) == 6:  # behind the first window, and half of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(offset)
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        code, _, err = call(capsys, "run", recipe)
    said = f"{PREFIX}{work} cannot be written: No space left on device"
    assert (code, err.splitlines()[-1], len(written)) == (2, said, 6)
    assert "Traceback" not in err
    assert not list(work.rglob("manifest.json")) and not list(work.rglob("hidden_states.*"))
    assert (work / ".statistics.being-written").exists()
    (work / "statistics" / "hidden_states.7").write_bytes(b"of another rank that was killed")
    assert commands.run_command("run", str(recipe), []) == 0
    assert not list(work.rglob("hidden_states.*")) and not list(work.rglob(".*.being-written"))
    found = files_of(work)
    shutil.rmtree(work)
    monkeypatch.undo()
    assert commands.run_command("run", str(recipe), ["calibration.window=auto"]) == 0
    assert found == files_of(work) and len(found) == 5


def test_a_disk_without_room_for_hidden_states_is_refused_before_they_are_written(
    tmp_path, recipe, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    said = error_message("run", recipe, "calibration.samples=64")
    assert said.startswith("hidden states between windows take 0.0 GB per rank, of which 0.0 GB do")
    assert f", and {tmp_path}/work has 0.0 GB; use a workdir with more room, " in said
    assert not list(tmp_path.rglob("hidden_states.*")) and not list(tmp_path.rglob("manifest.json"))
