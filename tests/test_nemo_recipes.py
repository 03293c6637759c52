"""NeMo recipes: those that ship and no others, run by nemo_run with the bytes of the command."""

import os
import subprocess
import sys

import pytest
import slurms
import yaml
from bad_models import PREFIX, ROOT, write_recipe
from test_ranks_of_others import hashes

from nemo_vlm_ptq.recipe import Recipe, load_recipe, shipped_recipes

run = pytest.importorskip("nemo_run", reason="needs nemo_run (pip install 'nemo-vlm-ptq[run]')")
import fiddle  # noqa: E402

from nemo_vlm_ptq.nemo import recipes  # noqa: E402

MODELS = ("llava15_7b", "llava15_13b", "vila15_3b", "vila15_8b", "phi3_vision", "phi35_vision")
FEW = ("quantize.format=w4a8_awq", "calibration.samples=8", "calibration.micro_batch=2")
STAGES = "stages=[import, observe, solve, export]"


def said(job):
    """The recipe that a job brings to its ranks."""
    return Recipe.model_validate(fiddle.build(job.recipe))


def words(command, home, **settings):
    """A command in the repository's folder, with experiments in `home`; its end."""
    own = {"NEMORUN_HOME": str(home), "PYTHONWARNINGS": "ignore"}
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | own | {"PATH": path, "COLUMNS": "200"} | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_that_ships_has_a_factory_with_its_settings(name):
    job = getattr(recipes, name)()
    assert said(job) == load_recipe(name)
    assert job.__fn_or_cls__ is recipes.ptq and job.folder == os.getcwd()
    assert run.cli.resolve_factory(recipes.ptq, name)() == job


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_a_factory_of_its_name(model):
    same = model if model in shipped_recipes() else f"{model}_fp8"
    assert said(getattr(recipes, model)()) == load_recipe(same)


def test_a_name_that_is_no_recipe_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'llava15_70b'"):
        _ = recipes.llava15_70b


def test_keys_are_attributes_and_travel_with_the_job(tmp_path):
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    job = recipes.llava15_7b_fp8()
    job.recipe.quantize.format = ("fp8", "int4_awq")
    job.recipe.parallel.tensor = 2
    job.recipe.config.mm_token_order = "row"
    sent = ZlibJSONSerializer()
    there = said(sent.deserialize(sent.serialize(job)))
    assert there.quantize.format == ("fp8", "int4_awq")
    assert (there.parallel.tensor, there.config) == (2, {"mm_token_order": "row"})


def test_a_recipe_of_ones_own_is_a_file(tmp_path):
    path = write_recipe(tmp_path, quantize={"kv_cache": "fp8"})
    job = recipes.job(str(path))
    recipes.override(job, ["quantize.kv_cache=none", "evaluate.from=engine"])
    own = yaml.safe_load(path.read_text())
    assert said(job) == Recipe.model_validate(
        own | {"quantize": {}, "evaluate": {"from": "engine"}}
    )


def quickstart(work, *more):
    """Words of a job that makes one of everything in a folder."""
    own = [f"recipe.{word}" for word in (*FEW, STAGES, f"workdir={work}")]
    return ["nemo_vlm_ptq.nemo.recipes", "quickstart", *own, *more, "--yes"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the plain command leaves."""
    folder = tmp_path_factory.mktemp("plain")
    keys = (*FEW, STAGES, f"workdir={folder / 'work'}")
    done = words(["nemo_vlm_ptq", "run", "quickstart", *keys], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = hashes(folder)
    assert {"w4a8_awq/hf/config.json", "w4a8_awq/trtllm/llm/rank1.safetensors"} < set(found)
    assert any(name.startswith("w4a8_awq/scales/") for name in found)
    return found


def test_ranks_that_nemo_run_starts_leave_the_bytes_of_the_command(tmp_path, expected):
    local = ("run.executor=local", "run.executor.ntasks_per_node=2")
    done = words(quickstart(tmp_path / "work", *local), tmp_path / "home")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "[default0]:[rank 0] import: " in done.stdout
    assert hashes(tmp_path) == expected


@pytest.fixture
def slurm():
    """A Slurm of two nodes."""
    with slurms.started() as why:
        if why:
            pytest.skip(why)
        yield


def test_a_job_on_two_nodes_of_slurm_leaves_the_bytes_of_the_command(slurm, tmp_path, expected):
    limits = ("partition=test", "time=00:10:00")
    cluster = (*limits, "nodes=2", "ntasks_per_node=1", "gpus_per_node=1")
    executor = ("run.executor=slurm", *(f"run.executor.{word}" for word in cluster))
    done = words(quickstart(tmp_path / "work", *executor, "--detach"), tmp_path / "home")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    slurms.until_all_is_over()
    job = slurms.asked("scontrol", "-o", "show", "job")
    logs = [path.read_text() for path in (tmp_path / "home").rglob("log-*.out")]
    assert " JobState=COMPLETED " in job and " NodeList=node[1-2] " in job, logs
    assert hashes(tmp_path) == expected


def test_a_job_that_fails_says_why_and_does_not_end_with_0(tmp_path):
    own = ("recipe.calibration.data=nowhere", f"recipe.workdir={tmp_path / 'work'}")
    local = ("run.executor=local", "run.executor.ntasks_per_node=2", "--yes")
    done = words(["nemo_vlm_ptq.nemo.recipes", "quickstart", *own, *local], tmp_path / "home")
    assert done.returncode == 1
    assert f"{PREFIX}data 'nowhere' is neither 'scenes' nor a folder\n" in done.stdout


def test_without_an_executor_the_command_starts_ranks_of_its_own(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    job = recipes.quickstart()
    job.folder, job.command = str(ROOT), "plan"
    before = sys.argv
    run.run(job)
    assert "fp8            -> trtllm, hf" in capfd.readouterr().out
    assert (os.getcwd(), sys.argv) == (str(tmp_path), before)


REFUSALS = [
    (("quickstrat",), "recipe 'quickstrat' is no file; recipes that ship: quickstart, quickstart_"),
    (("--factory", "lava15_7b"), "recipe 'lava15_7b' is no file; recipes that ship: llava15_7b, "),
    ((), "which recipe? name one with --factory"),
    (("quickstart", "recipe.quantise.format=fp8"), "unknown recipe key 'quantise'; did you mean"),
    (("quickstart", "recipe.export.tensor=two"), "recipe key 'export.tensor': Input should be"),
    (("quickstart", "recipe.stages=["), "'stages=[' is not an override: '[' is not YAML"),
    (("quickstart", "quantize.format=fp8"), "'quantize.format=fp8' is unknown; write recipe.KEY="),
    (("quickstart", "command=paln"), "unknown command 'paln'; known: run, plan, import, "),
    (("quickstart", "run.executor=lokal"), "run.executor: Executor lokal not found; got "),
    (("quickstart", "run.executor=local", "run.executor.nods=2"),
     "run.executor: Invalid argument: No parameter named 'nods'; got executor=local executor.nods"),
    (("quickstart", "run.executor=local", "run.executor.nodes=two"),
     "run.executor: Failed to parse 'two' as <class 'int'>: Invalid integer literal; got "),
    (("quickstart", "command=build", "run.executor=local"), "build runs in one process, and this "),
]  # fmt: skip


@pytest.mark.parametrize(("command", "reason"), REFUSALS)
def test_what_cannot_work_is_refused_in_one_line(monkeypatch, capfd, command, reason):
    monkeypatch.setattr(sys, "argv", ["nemo-vlm-ptq-nemo", *command, "--yes", "--dryrun"])
    monkeypatch.setattr(recipes.ptq.cli_entrypoint, "default_factory", None)
    with pytest.raises(SystemExit) as end:
        recipes.main()
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith(f"{PREFIX}{reason}") and err.count("\n") == 1


def test_build_refuses_ranks_that_a_launcher_started(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        recipes.ptq({"model": "m", "workdir": "w"}, command="build")
    err = capfd.readouterr().err
    assert err.startswith(f"{PREFIX}build runs in one process") and err.count("\n") == 1


def test_without_nemo_run_it_says_what_to_install():
    code = "import sys; sys.modules['nemo_run'] = None; import nemo_vlm_ptq.nemo.recipes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: NeMo recipes need nemo_run (")
    assert last.endswith("): pip install 'nemo-vlm-ptq[run]'")


def test_no_words_list_the_recipes():
    done = subprocess.run(
        [sys.executable, "-m", "nemo_vlm_ptq.nemo.recipes"], capture_output=True, text=True
    )
    assert set(done.stdout.splitlines()) > {*shipped_recipes(), *MODELS}


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Where nemo_run keeps experiments; it leaves no other trace."""
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)  # its shells read it, which pytest forbids
        yield tmp_path / "home"


def rendered(home, **options):
    """What nemo_run would hand to sbatch: lines of a run's script and of the build after it."""
    quantize, build = recipes.llava15_7b_fp8(), recipes.llava15_7b_fp8()
    build.command = "build"
    executor = recipes.slurm_executor("me", "batch", **options)
    alone = recipes.slurm_executor("me", "batch", **options | {"nodes": 1}, launcher=None)
    with run.Experiment("ptq", executor=executor) as experiment:
        first = experiment.add(quantize, name="quantize")
        experiment.add(build, name="build", executor=alone, dependencies=[first])
        experiment.dryrun(log=False, delete_exp_dir=False)
    scripts = {path.name: path.read_text() for path in home.rglob("*_sbatch.sh")}
    return [scripts[f"{name}_sbatch.sh"].splitlines() for name in ("quantize", "build")]


def step(lines):
    """The line of a script that runs the command."""
    (found,) = [line for line in lines if line.startswith("srun --output")]
    return found


def test_a_job_on_slurm_is_one_torchrun_a_node_and_none_around_build(home, tmp_path):
    image = "nvcr.io/nvidia/nemo:25.11"
    quantize, build = rendered(home, nodes=2, gpus_per_node=4, image=image, time="01:00:00")
    flags = {line.removeprefix("#SBATCH --") for line in quantize}
    assert flags > {"account=me", "partition=batch", "nodes=2", "gpus-per-node=4", "time=01:00:00",
                    "ntasks-per-node=1", "job-name=vlm-ptq.quantize",
                    "kill-on-invalid-dep=yes"}  # fmt: skip
    assert f" --container-image {image} --container-mounts {tmp_path}:{tmp_path}," in step(quantize)
    torchrun = "torchrun --rdzv-backend c10d --rdzv-endpoint $head_node_ip:29500 --rdzv-id"
    assert f" --kill-on-bad-exit=1 {torchrun} " in step(quantize)
    assert " --nnodes 2 --nproc-per-node 4 --node-rank $SLURM_NODEID " in step(quantize)
    assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1"} < set(build)
    assert "torchrun" not in step(build)
    assert " python -m nemo_run.core.runners.fdl_runner -n build " in step(build)


def test_without_an_image_there_are_no_words_for_containers(home):
    for lines in rendered(home, gpus_per_node=1):
        assert "--container" not in step(lines) and " /nemo_run/" not in step(lines)
