"""NeMo-Run recipes: factories of the shipped recipes, executors, and identical output files."""

import logging
import os
import subprocess
import sys

import pytest
import slurm_cluster
import yaml
from bad_models import PREFIX, ROOT, write_recipe
from test_external_launchers import hashes

from nemo_vlm_ptq.recipe import Recipe, load_recipe, shipped_recipes

run = pytest.importorskip("nemo_run", reason="requires nemo_run (pip install 'nemo-vlm-ptq[run]')")
import fiddle  # noqa: E402

from nemo_vlm_ptq.nemo import recipes  # noqa: E402

MODELS = ("llava15_7b", "llava15_13b", "vila15_3b", "vila15_8b", "phi3_vision", "phi35_vision")
SMALL_RUN = (
    "quantize.format=w4a8_awq", "calibration.samples=8", "calibration.micro_batch=2",
    "export.targets=[trtllm, hf]", "export.tensor=2",
)  # fmt: skip
STAGES = "stages=[import, observe, solve, export]"


def recipe_of(job):
    """Return the recipe that a job passes to its ranks."""
    return Recipe.model_validate(fiddle.build(job.recipe))


def run_module(command, home, **variables):
    """Run a module in the repository's folder with NeMo-Run's experiments in `home`."""
    env = {"NEMORUN_HOME": str(home), "PYTHONWARNINGS": "ignore"}
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | env | {"PATH": path, "COLUMNS": "200"} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_has_a_factory_with_its_settings(name):
    job = getattr(recipes, name)()
    assert recipe_of(job) == load_recipe(name)
    assert job.__fn_or_cls__ is recipes.ptq and job.folder == os.getcwd()
    assert run.cli.resolve_factory(recipes.ptq, name)() == job


@pytest.mark.parametrize("model", MODELS)
def test_the_name_of_a_former_recipe_has_a_factory(model):
    job = getattr(recipes, f"{model}_int4_awq")()
    assert recipe_of(job) == load_recipe(f"{model}_int4_awq")


def test_an_unknown_recipe_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'llava15_70b'"):
        _ = recipes.llava15_70b


def test_recipe_keys_are_attributes_and_are_serialized_with_the_job(tmp_path):
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    job = recipes.llava15_7b()
    job.recipe.quantize.format = ("fp8", "int4_awq")
    job.recipe.parallel.tensor = 2
    job.recipe.config.mm_token_order = "row"
    serializer = ZlibJSONSerializer()
    restored = recipe_of(serializer.deserialize(serializer.serialize(job)))
    assert restored.quantize.format == ("fp8", "int4_awq")
    assert (restored.parallel.tensor, restored.config) == (2, {"mm_token_order": "row"})


def test_a_job_can_use_a_recipe_file(tmp_path):
    path = write_recipe(tmp_path, quantize={"kv_cache": "fp8"})
    job = recipes.job(str(path))
    recipes.override(job, ["quantize.kv_cache=none", "evaluate.from=engine"])
    values = yaml.safe_load(path.read_text())
    assert recipe_of(job) == Recipe.model_validate(
        values | {"quantize": {}, "evaluate": values["evaluate"] | {"from": "engine"}}
    )


def quickstart(workdir, *args):
    """Return the command line of a quickstart job that writes every type of file."""
    overrides = [f"recipe.{word}" for word in (*SMALL_RUN, STAGES, f"workdir={workdir}")]
    return ["nemo_vlm_ptq.nemo.recipes", "quickstart", *overrides, *args, "--yes"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Files that nemo-vlm-ptq writes."""
    folder = tmp_path_factory.mktemp("plain")
    overrides = (*SMALL_RUN, STAGES, f"workdir={folder / 'work'}")
    done = run_module(["nemo_vlm_ptq", "run", "quickstart", *overrides], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = hashes(folder)
    assert {"w4a8_awq/hf/config.json", "w4a8_awq/trtllm/llm/rank1.safetensors"} < set(found)
    assert any(name.startswith("w4a8_awq/scales/") for name in found)
    return found


def test_local_executor_writes_the_files_of_the_command(tmp_path, expected):
    local = ("run.executor=local", "run.executor.ntasks_per_node=2")
    done = run_module(quickstart(tmp_path / "work", *local), tmp_path / "home")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "[default0]:[rank 0] import: " in done.stdout
    assert hashes(tmp_path) == expected


@pytest.fixture
def slurm():
    """A running two-node Slurm cluster."""
    with slurm_cluster.running_cluster() as reason:
        if reason:
            pytest.skip(reason)
        yield


def test_slurm_executor_on_two_nodes_writes_the_files_of_the_command(slurm, tmp_path, expected):
    limits = ("partition=test", "time=00:10:00")
    cluster = (*limits, "nodes=2", "ntasks_per_node=1", "gpus_per_node=1")
    executor = ("run.executor=slurm", *(f"run.executor.{word}" for word in cluster))
    done = run_module(quickstart(tmp_path / "work", *executor, "--detach"), tmp_path / "home")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    slurm_cluster.wait_until_queue_is_empty()
    job = slurm_cluster.slurm_output("scontrol", "-o", "show", "job")
    logs = [path.read_text() for path in (tmp_path / "home").rglob("log-*.out")]
    assert " JobState=COMPLETED " in job and " NodeList=node[1-2] " in job, logs
    assert hashes(tmp_path) == expected


def test_a_failed_job_shows_the_error_and_exits_with_1(tmp_path):
    overrides = ("recipe.calibration.data=nowhere", f"recipe.workdir={tmp_path / 'work'}")
    local = ("run.executor=local", "run.executor.ntasks_per_node=2", "--yes")
    done = run_module(
        ["nemo_vlm_ptq.nemo.recipes", "quickstart", *overrides, *local], tmp_path / "home"
    )
    assert done.returncode == 1
    assert (
        f"{PREFIX}data must be 'scenes', 'hard_scenes' or an existing folder, got 'nowhere'\n"
        in done.stdout
    )


def test_without_an_executor_the_command_starts_its_own_ranks(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    job = recipes.quickstart()
    job.folder, job.command = str(ROOT), "plan"
    argv = sys.argv
    run.run(job)
    assert "fp8            -> compressed_tensors, hf" in capfd.readouterr().out
    assert (os.getcwd(), sys.argv) == (str(tmp_path), argv)


INVALID_ARGS = [
    (("quickstrat",), "recipe 'quickstrat' is not a file; shipped recipes: quickstart, "),
    (("--factory", "lava15_7b"), "recipe 'lava15_7b' is not a file; shipped recipes: llava15_"),
    ((), "recipe is missing; name one with --factory"),
    (("quickstart", "recipe.quantise.format=fp8"), "unknown recipe key 'quantise'; did you mean"),
    (("quickstart", "recipe.export.tensor=two"), "recipe key 'export.tensor': Input should be"),
    (("quickstart", "recipe.stages=["), "'stages=[' is not an override: '[' is not YAML"),
    (("quickstart", "quantize.format=fp8"),
     "unknown argument 'quantize.format=fp8'; expected recipe.KEY=VALUE, "),
    (("quickstart", "command=paln"), "unknown command 'paln'; supported: run, plan, import, "),
    (("quickstart", "run.executor=lokal"), "run.executor: Executor lokal not found; got "),
    (("quickstart", "run.executor=local", "run.executor.nods=2"),
     "run.executor: Invalid argument: No parameter named 'nods'; got executor=local executor.nods"),
    (("quickstart", "run.executor=local", "run.executor.nodes=two"),
     "run.executor: Failed to parse 'two' as <class 'int'>: Invalid integer literal; got "),
    (("quickstart", "command=build", "run.executor=local"),
     "command 'build' must run in a single process"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), INVALID_ARGS)
def test_invalid_arguments_are_rejected_in_one_line(monkeypatch, capfd, args, message):
    monkeypatch.setattr(sys, "argv", ["nemo-vlm-ptq-nemo", *args, "--yes", "--dryrun"])
    monkeypatch.setattr(recipes.ptq.cli_entrypoint, "default_factory", None)
    with pytest.raises(SystemExit) as end:
        recipes.main()
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith(f"{PREFIX}{message}") and err.count("\n") == 1


def test_build_rejects_ranks_started_by_a_launcher(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        recipes.ptq({"model": "m", "workdir": "w"}, command="build")
    err = capfd.readouterr().err
    assert err.startswith(f"{PREFIX}command 'build' must run in a single process")
    assert err.count("\n") == 1


def test_a_missing_nemo_run_is_reported_with_the_package_to_install():
    code = "import sys; sys.modules['nemo_run'] = None; import nemo_vlm_ptq.nemo.recipes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: NeMo recipes require nemo_run (")
    assert last.endswith("); run: pip install 'nemo-vlm-ptq[run]'")


def test_without_arguments_the_recipes_are_listed():
    done = subprocess.run(
        [sys.executable, "-m", "nemo_vlm_ptq.nemo.recipes"], capture_output=True, text=True
    )
    assert set(done.stdout.splitlines()) > {*shipped_recipes(), *MODELS}


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Folder of NeMo-Run's experiments."""
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    # an experiment replaces the root logger's handlers, for this process's later tests too
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    with open(os.devnull) as devnull:
        # NeMo-Run starts shells that read stdin, which pytest forbids
        monkeypatch.setattr(sys, "stdin", devnull)
        yield tmp_path / "home"


def rendered(home, **options):
    """Return the lines of the sbatch scripts of a quantize job and of the build job after it."""
    quantize, build = recipes.llava15_7b(), recipes.llava15_7b()
    build.command = "build"
    executor = recipes.slurm_executor("me", "batch", **options)
    single_process = recipes.slurm_executor("me", "batch", **options | {"nodes": 1}, launcher=None)
    with run.Experiment("ptq", executor=executor) as experiment:
        first = experiment.add(quantize, name="quantize")
        experiment.add(build, name="build", executor=single_process, dependencies=[first])
        experiment.dryrun(log=False, delete_exp_dir=False)
    scripts = {path.name: path.read_text() for path in home.rglob("*_sbatch.sh")}
    return [scripts[f"{name}_sbatch.sh"].splitlines() for name in ("quantize", "build")]


def srun_line(lines):
    """Return the line of a script that runs the command."""
    (found,) = [line for line in lines if line.startswith("srun --output")]
    return found


def test_a_slurm_job_runs_one_torchrun_per_node_but_none_for_build(home, tmp_path):
    image = "nvcr.io/nvidia/nemo:25.11"
    quantize, build = rendered(home, nodes=2, gpus_per_node=4, image=image, time="01:00:00")
    flags = {line.removeprefix("#SBATCH --") for line in quantize}
    assert flags > {"account=me", "partition=batch", "nodes=2", "gpus-per-node=4", "time=01:00:00",
                    "ntasks-per-node=1", "job-name=vlm-ptq.quantize",
                    "kill-on-invalid-dep=yes"}  # fmt: skip
    container = f" --container-image {image} --container-mounts {tmp_path}:{tmp_path},"
    assert container in srun_line(quantize)
    torchrun = "torchrun --rdzv-backend c10d --rdzv-endpoint $head_node_ip:29500 --rdzv-id"
    assert f" --kill-on-bad-exit=1 {torchrun} " in srun_line(quantize)
    assert " --nnodes 2 --nproc-per-node 4 --node-rank $SLURM_NODEID " in srun_line(quantize)
    assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1"} < set(build)
    assert "torchrun" not in srun_line(build)
    assert " python -m nemo_run.core.runners.fdl_runner -n build " in srun_line(build)


def test_without_an_image_there_are_no_container_options(home):
    for lines in rendered(home, gpus_per_node=1):
        assert "--container" not in srun_line(lines) and " /nemo_run/" not in srun_line(lines)
