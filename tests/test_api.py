"""The Python API: quantize a model, read back what was written, errors as exceptions."""

import subprocess
import sys

import models
import pytest

import nemo_vlm_ptq
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.workdir import store

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """tiny-llava in two formats for two targets."""
    return nemo_vlm_ptq.quantize(
        model=models.TINY_LLAVA,
        workdir=tmp_path_factory.mktemp("api") / "work",
        format=["fp8", "int4_awq"],
        data="scenes",
        calibration={"samples": 8},
        quantize={"group_size": 64},
        export={"targets": ["compressed_tensors", "hf"]},
    )


def test_every_export_is_written_and_verified(result):
    assert set(result.exports) == {"fp8", "int4_awq"}
    for name, targets in result.exports.items():
        assert set(targets) == {"compressed_tensors", "hf"}
        for target, folder in targets.items():
            assert folder == result.workdir / name / target
            assert store.require_manifest(folder, "export")
        assert result.verify[name]["passed"]


def test_errors_are_per_format_layer_and_linear(result):
    found = {(entry["format"], entry["layer"], entry["linear"]) for entry in result.errors}
    assert found == {
        (name, layer, linear)
        for name in ("fp8", "int4_awq")
        for layer in range(4)
        for linear in LINEARS
    }
    searched = [entry for entry in result.errors if entry["format"] == "int4_awq"]
    assert all(0 < entry["error"] < 1 for entry in searched)


def test_nothing_is_scored_without_data_and_the_report_is_written(result):
    assert result.scores == {}
    assert result.report == result.workdir / "report" / "index.html"
    assert "int4_awq" in result.report.read_text()


def test_a_second_call_skips_finished_stages(result):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in result.workdir.rglob("*.safetensors")}

    before = stamps()
    again = nemo_vlm_ptq.quantize(
        model=models.TINY_LLAVA,
        workdir=result.workdir,
        format=["fp8", "int4_awq"],
        data="scenes",
        calibration={"samples": 8},
        quantize={"group_size": 64},
        export={"targets": ["compressed_tensors", "hf"]},
    )
    assert again == result and stamps() == before


SCRIPT = """
import sys, nemo_vlm_ptq
result = nemo_vlm_ptq.quantize(
    sys.argv[1], sys.argv[2], format="int8_wo", data="scenes", calibration={"samples": 8},
    parallel={"tensor": 2}, stages=["import", "observe", "solve", "export"],
)
assert result.exports["int8_wo"]["compressed_tensors"].is_dir() and len(result.errors) == 16
"""


def test_ranks_of_torchrun_add_a_format_to_the_work_folder(result, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, str(script), str(models.TINY_LLAVA), result.workdir],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    store.require_manifest(result.workdir / "int8_wo" / "compressed_tensors", "export")


@pytest.mark.parametrize(
    ("code", "last", "raised"),
    [
        (2, "error: no such folder", UserError("no such folder")),
        (3, "error: logits differ", VerificationError("logits differ")),
        (1, "error: rank 0 failed", RuntimeError("rank 0 failed")),
        (7, "no reason", RuntimeError("the run ended with exit code 7")),
    ],
)
def test_the_log_is_forwarded_as_it_is_and_its_error_is_raised(
    tmp_path, monkeypatch, capsys, code, last, raised
):
    bar = "observe: 10%\robserve: 90%\r\n"
    program = tmp_path / "python"
    (tmp_path / "log").write_text(f"{bar}nemo-vlm-ptq: {last}\n", newline="")
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/log >&2; exit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(type(raised), match=f"^{raised}$"):
        nemo_vlm_ptq.quantize(models.TINY_LLAVA, tmp_path / "work", data="scenes")
    expected = bar if code < 7 else f"{bar}nemo-vlm-ptq: {last}\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp9"}, "unknown format 'fp9'; supported: "),
        ({"format": "fp8"}, "calibration.data is not set: "),
        ({"data": "scenes", "exprot": {"tensor": 2}}, "unknown recipe key 'exprot'; did you mean"),
        ({"data": "scenes", "quantize": 3}, "quantize must be a dictionary of recipe keys, got 3"),
    ],
)
def test_what_cannot_work_raises_user_error(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        nemo_vlm_ptq.quantize(model=models.TINY_LLAVA, workdir=tmp_path / "work", **options)


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, nemo_vlm_ptq; "
        "print([name for name in ('torch', 'yaml', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"
