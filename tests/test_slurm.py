"""slurm/: the job chain on two nodes, preemption, failures, and input rejected by submit.sh."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import PIL.Image
import pytest
import scripts
from bad_models import PREFIX, ROOT, askable, write_recipe
from slurm_cluster import (
    job_fields,
    running_cluster,
    slurm_output,
    wait_until,
    wait_until_queue_is_empty,
)
from test_external_launchers import hashes
from test_full_size import write_sparse_model

FORMATS = ("fp8", "int4_awq")
ARGS = ("recipe.yaml", "workdir=work")
SITE = {"PARTITION": "test", "NODES": "2", "GPUS_PER_NODE": "0", "GPU_TYPE": "", "IMAGE": "",
        "MOUNTS": "", "ACCOUNT": "", "OPTIONS": "()",
        **{f"TIME_{job}": "0:10:00" for job in ("OBSERVE", "SOLVE", "BUILD", "EVALUATE",
                                                "REPORT")}}  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    """A running two-node Slurm cluster."""
    with running_cluster() as reason:
        if reason:
            pytest.skip(reason)
        yield


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    return scripts.make_venv(tmp_path_factory.mktemp("venv"))


def submit(venv, folder, *args, env=(), **site):
    """Run slurm/submit.sh in a folder with settings of a site and return the process."""
    lines = [f"{key}={value}\n" for key, value in (SITE | site).items()]
    (folder / "site.env").write_text("".join(lines))
    variables = {"NEMO_VLM_PTQ_SITE": str(folder / "site.env"), "NEMO_VLM_PTQ_VENV": str(venv),
                 "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}  # fmt: skip
    return subprocess.run(
        [ROOT / "slurm" / "submit.sh", *args],
        cwd=folder,
        env=os.environ | variables | dict(env),
        capture_output=True,
        text=True,
        timeout=120,
    )


def queued_jobs(done):
    """Return job name -> job id from the output of submit.sh."""
    assert done.returncode == 0, done.stderr
    return {name: number for number, name in map(str.split, done.stdout.splitlines())}


def status(venv, folder):
    """Return the output of `nemo-vlm-ptq status` for the workdir."""
    command = [venv / "bin" / "nemo-vlm-ptq", "status", "work"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def job_logs(folder):
    """Return the logs of all jobs."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("work/slurm/*.log")))


def recipe(folder, **sections):
    """Write a recipe with two formats and few evaluation questions."""
    settings = {
        "quantize": {"format": list(FORMATS)},
        "calibration": {"data": "scenes", "samples": 16, "micro_batch": 2},
        "export": {"targets": ["trtllm", "hf"], "tensor": 2},
        "evaluate": {"data": "scenes", "tasks": ["gqa", "sight"], "limit": 64},
    }
    return write_recipe(folder, **settings | sections)


def test_the_chain_makes_verified_and_evaluated_checkpoints_on_two_nodes(slurm, venv, tmp_path):
    recipe(tmp_path, parallel={"tensor": 2})
    begin = time.monotonic()
    jobs = queued_jobs(submit(venv, tmp_path, *ARGS))
    assert list(jobs) == ["observe", "solve_export", "evaluate", "report"]
    wait_until_queue_is_empty()
    print(f"from submit to report: {time.monotonic() - begin:.0f} s")
    output = status(venv, tmp_path)
    print(output)
    assert job_fields(jobs["observe"])["NodeList"] == "node[1-2]", job_logs(tmp_path)
    assert output.count(" COMPLETED ") == 5 and "last error" not in output, job_logs(tmp_path)
    for name in FORMATS:
        assert re.search(rf"^{name} +finished +finished +finished +finished$", output, re.M)
        result = json.loads((tmp_path / "work" / name / "evaluate" / "gqa.json").read_text())
        assert result["sees"] and result["accuracy"]["total"] == 64
    assert (tmp_path / "work" / "report" / "index.html").is_file()


def test_a_preempted_job_resumes_and_writes_the_files_of_an_uninterrupted_one(
    slurm, venv, tmp_path
):
    """The job gets USR1 during observe and is requeued, first on both nodes, then on one."""
    sections = {
        "calibration": {
            "data": "scenes",
            "samples": 800,
            "micro_batch": 2,
            "keep_statistics": True,
        },
        "quantize": {"format": "int4_awq"},
    }
    uninterrupted = tmp_path / "uninterrupted"
    for folder in (uninterrupted, tmp_path):
        folder.mkdir(exist_ok=True)
        recipe(folder, **sections)
    job = queued_jobs(submit(venv, tmp_path, *ARGS, "stages=[import,observe]"))["observe"]
    for times, nodes in ((1, "2"), (2, "1")):
        wait_until(
            lambda times=times: job_logs(tmp_path).count("[rank 0] import: ") == times,
            job_logs(tmp_path),
        )
        time.sleep(4)  # enough for a part of the micro-batches
        slurm_output("scancel", "--signal=USR1", "--batch", job)
        wait_until(
            lambda times=times: job_fields(job)["Restarts"] == str(times), job_logs(tmp_path)
        )
        if nodes == "1":
            slurm_output("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
        wait_until(lambda: job_fields(job)["JobState"] == "RUNNING", job_logs(tmp_path))
        assert job_fields(job)["NumNodes"] == nodes
    wait_until_queue_is_empty()
    pattern = r"stop requested: statistics of (\d+) samples are saved"
    messages = re.findall(pattern, job_logs(tmp_path))
    saved = [int(count) for count in messages]
    assert len(saved) == 2 and 0 < saved[0] < saved[1] < 800, job_logs(tmp_path)
    for folder in (uninterrupted, tmp_path):
        args = ("run", *ARGS, "stages=[import,observe,solve]")
        code, _, err = scripts.run("run.sh", venv, folder, *args, GPUS_PER_NODE="1")
        assert code == 0, err
    resumed, expected = hashes(tmp_path), hashes(uninterrupted)
    names = [name for name in expected if name.startswith(("statistics/", "int4_awq/scales/"))]
    for name in names:
        print(name, resumed[name]["sha256"][:16], expected[name]["sha256"][:16])
    assert all(resumed[name] == expected[name] for name in names)
    assert {name.partition("/")[0] for name in names} == {"statistics", "int4_awq"}


def test_a_failed_rank_ends_the_chain_and_status_shows_the_error(slurm, venv, tmp_path):
    recipe(tmp_path)
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    question = {"isBalanced": True, "question": "What is it?", "answer": "a box"}
    questions = {name: question | {"imageId": name} for name in "12"}
    (tmp_path / "data" / "questions.json").write_text(json.dumps(questions))
    for name in "12":
        PIL.Image.effect_noise((64, 64), 90).convert("RGB").save(images / f"{name}.jpg")
    content = (images / "2.jpg").read_bytes()  # its header is whole, as the plan finds
    (images / "2.jpg").write_bytes(content[: len(content) // 2])
    jobs = queued_jobs(
        submit(venv, tmp_path, *ARGS, "calibration.data=data", "calibration.samples=2")
    )
    wait_until_queue_is_empty()
    assert job_fields(jobs["observe"])["JobState"] == "FAILED"
    assert job_fields(jobs["evaluate"])["JobState"] == "CANCELLED"
    output = status(venv, tmp_path)
    print(output)
    assert "last error: run on node" in output, job_logs(tmp_path)
    assert "\n  data/images/2.jpg is not a readable image: " in output


def test_a_dry_run_prints_the_commands_for_four_nodes_of_eight_gpus(venv, tmp_path):
    model = askable(write_sparse_model(tmp_path, "llava-1.5-13b-hf"))
    site = {"NODES": "4", "GPUS_PER_NODE": "8", "GPU_TYPE": "h100", "ACCOUNT": "me",
            "PARTITION": "batch"}  # fmt: skip
    args = (
        "--dry-run",
        "llava15_13b",
        f"model={model}",
        "workdir=work",
        "calibration.data=scenes",
        "evaluate.data=scenes",
        "export.targets=[trtllm]",
    )
    done = submit(venv, tmp_path, *args, "stages=[import,observe,solve,export,verify,build]",
                  env={"PATH": path_without("sbatch", tmp_path / "others")}, **site)  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    observe, solve, build = done.stdout.splitlines()
    assert observe.startswith("observe=$(sbatch --parsable --account=me --partition=batch ")
    assert " --nodes=4 --gpus-per-node=8 " in observe and "--dependency" not in observe
    assert ' --array=0-0 --kill-on-invalid-dep=yes "--dependency=afterok:$observe" ' in solve
    assert " --nodes=1 " in build and '"--dependency=aftercorr:$solve_export"' in build
    assert not (tmp_path / "work").exists()


def path_without(program, folder):
    """Return a PATH without one program: a folder of links to all other programs."""
    folder.mkdir(exist_ok=True)
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        for path in Path(directory).glob("*"):
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
    (folder / program).unlink(missing_ok=True)
    return str(folder)


def assert_rejected(done, message):
    """Assert exit code 2 and an error of one line that starts with the message."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.removeprefix(PREFIX).removeprefix("error: ").startswith(message), done.stderr


def test_invalid_input_is_rejected_before_anything_is_queued(venv, tmp_path, monkeypatch):
    recipe(tmp_path)
    bin_folder = tmp_path / "bin"  # a fake Slurm with partitions that rejects all jobs
    bin_folder.mkdir()
    for name, body in (
        ("sinfo", "echo batch; echo long"),
        ("sbatch", "exit 1"),
        ("squeue", "exit 1"),
    ):
        (bin_folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    assert_rejected(submit(venv, tmp_path, *ARGS), "PARTITION in ")
    site = {"PARTITION": "batch"}
    assert_rejected(submit(venv, tmp_path, "nothing", **site), "recipe 'nothing' is not a file")
    assert_rejected(submit(venv, tmp_path, "--wet", **site), "unknown option --wet")
    assert_rejected(submit(venv, tmp_path, **site), "slurm/submit.sh requires a recipe")
    missing = {"NEMO_VLM_PTQ_SITE": str(tmp_path / "nothing.env")}
    assert_rejected(
        submit(venv, tmp_path, *ARGS, env=missing, **site), f"{tmp_path}/nothing.env does not exist"
    )
    assert_rejected(submit(venv, tmp_path, *ARGS, NODES="two", **site), "NODES in ")
    assert_rejected(submit(venv, tmp_path, *ARGS, GPU_TYPE="h1000", **site), "GPU_TYPE in ")
    assert_rejected(
        submit(venv, tmp_path, *ARGS, "parallel.pipeline=4", **site),
        "parallel: tensor x pipeline is 4",
    )
    args = (*ARGS, "quantize.format=nvfp4", "stages=[export,build]")
    assert_rejected(
        submit(venv, tmp_path, *args, GPU_TYPE="h100", **site), "format nvfp4: engines require"
    )
    (tmp_path / "file").write_text("")
    assert_rejected(
        submit(venv, tmp_path, "recipe.yaml", "workdir=file/work", **site),
        f"workdir file/work: {tmp_path}/file is not a folder",
    )
    (tmp_path / "work" / "slurm").mkdir(parents=True)
    (tmp_path / "work" / "slurm" / "jobs").write_text("1 observe\n")  # unknown to squeue
    assert_rejected(submit(venv, tmp_path, *ARGS, **site), "sbatch rejected observe; no job")
    no_sbatch = {"PATH": path_without("sbatch", tmp_path / "others")}
    assert_rejected(submit(venv, tmp_path, *ARGS, env=no_sbatch, **site), "sbatch is not on PATH")
    assert (tmp_path / "work" / "slurm" / "jobs").read_text() == "1 observe\n"


def test_a_workdir_of_another_recipe_is_rejected(venv, tmp_path):
    recipe(tmp_path)
    args = (*ARGS, "stages=[import,observe,solve]")
    code, _, err = scripts.run("run.sh", venv, tmp_path, "run", *args, GPUS_PER_NODE="1")
    assert code == 0, err
    for override, message in (
        ("export.dtype=float16", "work/megatron exists and was made with dtype="),
        ("calibration.seed=1", "work/statistics exists and was made with seed=0"),
        ("quantize.group_size=64", "work/int4_awq/scales exists and was made with group_size=128"),
    ):
        assert_rejected(submit(venv, tmp_path, "--dry-run", *ARGS, override), message)


def test_status_of_a_workdir_without_slurm(venv, tmp_path):
    recipe(tmp_path)
    (tmp_path / "work").mkdir()
    assert status(venv, tmp_path).splitlines()[0] == "observe   missing"
    command = [venv / "bin" / "nemo-vlm-ptq", "status", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert_rejected(done, "nowhere is not a folder; expected the workdir of a recipe")
