"""slurm/: the chain on a Slurm of two nodes, its jobs stopped and failing, and what is refused."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import PIL.Image
import pytest
import scripts
import slurms
from bad_models import PREFIX, ROOT, askable, write_recipe
from slurms import asked, facts, until, until_all_is_over
from test_full_size import hollow_folder
from test_ranks_of_others import hashes

FORMATS = ("fp8", "int4_awq")
WORDS = ("recipe.yaml", "workdir=work")
SITE = {"PARTITION": "test", "NODES": "2", "GPUS_PER_NODE": "0", "GPU_TYPE": "", "IMAGE": "",
        "MOUNTS": "", "ACCOUNT": "", "OPTIONS": "()",
        **{f"TIME_{job}": "0:10:00" for job in ("OBSERVE", "SOLVE", "BUILD", "EVALUATE",
                                                "REPORT")}}  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of two nodes."""
    with slurms.started() as why:
        if why:
            pytest.skip(why)
        yield


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    return scripts.make_venv(tmp_path_factory.mktemp("venv"))


def submit(venv, folder, *words, env=(), **site):
    """slurm/submit.sh in a folder, with facts of a site; what it did."""
    lines = [f"{key}={value}\n" for key, value in (SITE | site).items()]
    (folder / "site.env").write_text("".join(lines))
    own = {"NEMO_VLM_PTQ_SITE": str(folder / "site.env"), "NEMO_VLM_PTQ_VENV": str(venv),
           "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}  # fmt: skip
    return subprocess.run(
        [ROOT / "slurm" / "submit.sh", *words],
        cwd=folder,
        env=os.environ | own | dict(env),
        capture_output=True,
        text=True,
        timeout=120,
    )


def queued(done):
    """Name of a job -> its number, of what submit.sh printed."""
    assert done.returncode == 0, done.stderr
    return {name: number for number, name in map(str.split, done.stdout.splitlines())}


def status(venv, folder):
    """What the command says of the workdir."""
    command = [venv / "bin" / "nemo-vlm-ptq", "status", "work"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def log(folder):
    """Everything that jobs wrote."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("work/slurm/*.log")))


def recipe(folder, **more):
    """Two formats, scored on few questions."""
    settings = {
        "quantize": {"format": list(FORMATS)},
        "calibration": {"samples": 16, "micro_batch": 2},
        "export": {"targets": ["trtllm", "hf"], "tensor": 2},
        "evaluate": {"tasks": ["gqa", "sight"], "limit": 64},
    }
    return write_recipe(folder, **settings | more)


def test_the_chain_makes_proven_and_scored_checkpoints_on_two_nodes(slurm, venv, tmp_path):
    recipe(tmp_path, parallel={"tensor": 2})
    begin = time.monotonic()
    jobs = queued(submit(venv, tmp_path, *WORDS))
    assert list(jobs) == ["observe", "solve_export", "evaluate", "report"]
    until_all_is_over()
    print(f"from submit to report: {time.monotonic() - begin:.0f} s")
    said = status(venv, tmp_path)
    print(said)
    assert facts(jobs["observe"])["NodeList"] == "node[1-2]", log(tmp_path)
    assert said.count(" COMPLETED ") == 5 and "last error" not in said, log(tmp_path)
    for name in FORMATS:
        assert re.search(rf"^{name} +finished +finished +finished +finished$", said, re.M)
        result = json.loads((tmp_path / "work" / name / "evaluate" / "gqa.json").read_text())
        assert result["sees"] and result["accuracy"]["total"] == 64
    assert (tmp_path / "work" / "report" / "index.html").is_file()


def test_a_job_that_is_preempted_goes_on_and_leaves_the_bytes_of_an_unbroken_one(
    slurm, venv, tmp_path
):
    """It is sent USR1 in the middle, requeues, and goes on: on both nodes, and then on one."""
    many = {"calibration": {"samples": 800, "micro_batch": 2}, "quantize": {"format": "int4_awq"}}
    unbroken = tmp_path / "unbroken"
    for folder in (unbroken, tmp_path):
        folder.mkdir(exist_ok=True)
        recipe(folder, **many)
    job = queued(submit(venv, tmp_path, *WORDS, "stages=[import,observe]"))["observe"]
    for times, nodes in ((1, "2"), (2, "1")):
        until(lambda times=times: log(tmp_path).count("[rank 0] import: ") == times, log(tmp_path))
        time.sleep(4)  # a good part of the micro-batches
        asked("scancel", "--signal=USR1", "--batch", job)
        until(lambda times=times: facts(job)["Restarts"] == str(times), log(tmp_path))
        if nodes == "1":
            asked("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
        until(lambda: facts(job)["JobState"] == "RUNNING", log(tmp_path))
        assert facts(job)["NumNodes"] == nodes
    until_all_is_over()
    saved = list(map(int, re.findall(r"asked to stop; (\d+) samples are saved", log(tmp_path))))
    assert len(saved) == 2 and 0 < saved[0] < saved[1] < 800, log(tmp_path)
    for folder in (unbroken, tmp_path):
        words = ("run", *WORDS, "stages=[import,observe,solve]")
        code, _, err = scripts.run("run.sh", venv, folder, *words, GPUS_PER_NODE="1")
        assert code == 0, err
    mine, whole = hashes(tmp_path), hashes(unbroken)
    same = [name for name in whole if name.startswith(("statistics/", "int4_awq/scales/"))]
    for name in same:
        print(name, mine[name]["sha256"][:16], whole[name]["sha256"][:16])
    assert same and all(mine[name] == whole[name] for name in same)


def test_a_rank_that_fails_ends_the_chain_and_status_says_why(slurm, venv, tmp_path):
    recipe(tmp_path)
    pictures = tmp_path / "data" / "images"
    pictures.mkdir(parents=True)
    ask = {"isBalanced": True, "question": "What is it?", "answer": "a box"}
    both = {name: ask | {"imageId": name} for name in "12"}
    (tmp_path / "data" / "questions.json").write_text(json.dumps(both))
    PIL.Image.new("RGB", (64, 64)).save(pictures / "1.jpg")  # the first is tried beforehand
    (pictures / "2.jpg").write_text("no picture")
    jobs = queued(submit(venv, tmp_path, *WORDS, "calibration.data=data", "calibration.samples=2"))
    until_all_is_over()
    assert facts(jobs["observe"])["JobState"] == "FAILED"
    assert facts(jobs["evaluate"])["JobState"] == "CANCELLED"
    said = status(venv, tmp_path)
    print(said)
    assert "last error: run on node" in said, log(tmp_path)
    assert "\n  data/images/2.jpg is no readable picture: cannot identify" in said


def test_a_dry_run_prints_the_commands_for_four_nodes_of_eight_gpus(venv, tmp_path):
    model = askable(hollow_folder(tmp_path, "llava-1.5-13b-hf"))
    site = {"NODES": "4", "GPUS_PER_NODE": "8", "GPU_TYPE": "h100", "ACCOUNT": "me",
            "PARTITION": "batch"}  # fmt: skip
    words = ("--dry-run", "llava15_13b_fp8", f"model={model}", "workdir=work")
    done = submit(venv, tmp_path, *words, "stages=[import,observe,solve,export,verify,build]",
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
    """A PATH with everything that is on it but one program, as links in a folder."""
    folder.mkdir(exist_ok=True)
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for path in Path(place).glob("*"):
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
    (folder / program).unlink(missing_ok=True)
    return str(folder)


def refused(done, reason):
    """One line, exit code 2."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.removeprefix(PREFIX).removeprefix("error: ").startswith(reason), done.stderr


def test_what_cannot_work_is_refused_before_anything_is_queued(venv, tmp_path, monkeypatch):
    recipe(tmp_path)
    bin_folder = tmp_path / "bin"  # an empty Slurm: it has partitions, and nobody may queue
    bin_folder.mkdir()
    for name, answer in (
        ("sinfo", "echo batch; echo long"),
        ("sbatch", "exit 1"),
        ("squeue", "exit 1"),
    ):
        (bin_folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    refused(submit(venv, tmp_path, *WORDS), "PARTITION=test in ")
    site = {"PARTITION": "batch"}
    refused(submit(venv, tmp_path, "nothing", **site), "recipe 'nothing' is no file")
    refused(submit(venv, tmp_path, "--wet", **site), "unknown option --wet")
    refused(submit(venv, tmp_path, **site), "slurm/submit.sh needs a recipe")
    missing = {"NEMO_VLM_PTQ_SITE": str(tmp_path / "nothing.env")}
    refused(submit(venv, tmp_path, *WORDS, env=missing, **site), f"no {tmp_path}/nothing.env")
    refused(submit(venv, tmp_path, *WORDS, NODES="two", **site), "NODES=two in ")
    refused(submit(venv, tmp_path, *WORDS, GPU_TYPE="h1000", **site), "GPU_TYPE=h1000 in ")
    refused(submit(venv, tmp_path, *WORDS, "parallel.pipeline=4", **site), "parallel: one model")
    words = (*WORDS, "quantize.format=nvfp4", "stages=[export,build]")
    refused(
        submit(venv, tmp_path, *words, GPU_TYPE="h100", **site), "format nvfp4: no engine of it"
    )
    (tmp_path / "file").write_text("")
    refused(
        submit(venv, tmp_path, "recipe.yaml", "workdir=file/work", **site), "cannot make the fol"
    )
    (tmp_path / "work" / "slurm").mkdir(parents=True)
    (tmp_path / "work" / "slurm" / "jobs").write_text("1 observe\n")  # squeue has forgotten it
    refused(submit(venv, tmp_path, *WORDS, **site), "sbatch refuses observe, and nothing")
    no_sbatch = {"PATH": path_without("sbatch", tmp_path / "others")}
    refused(submit(venv, tmp_path, *WORDS, env=no_sbatch, **site), "no sbatch on PATH")
    assert (tmp_path / "work" / "slurm" / "jobs").read_text() == "1 observe\n"


def test_a_workdir_of_another_recipe_is_refused(venv, tmp_path):
    recipe(tmp_path)
    words = (*WORDS, "stages=[import,observe,solve]")
    code, _, err = scripts.run("run.sh", venv, tmp_path, "run", *words, GPUS_PER_NODE="1")
    assert code == 0, err
    for other, reason in (
        ("export.dtype=float16", "work/megatron exists and was made with dtype="),
        ("calibration.seed=1", "work/statistics exists and was made with seed=0"),
        ("quantize.group_size=64", "work/int4_awq/scales exists and was made with group_size=128"),
    ):
        refused(submit(venv, tmp_path, "--dry-run", *WORDS, other), reason)


def test_status_of_a_workdir_without_slurm(venv, tmp_path):
    recipe(tmp_path)
    (tmp_path / "work").mkdir()
    assert "import    missing" in status(venv, tmp_path)
    command = [venv / "bin" / "nemo-vlm-ptq", "status", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    refused(done, "nowhere is no folder; status wants the workdir of a recipe")
