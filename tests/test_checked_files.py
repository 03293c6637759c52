"""What a stage reads of the workdir is as it was written, or is refused with what mends it."""

import shutil

import models
import pytest
import yaml
from bad_models import said_by, write_recipe
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.stages.logits import write_logits
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import check_folder, checked_file

ALL = ("import", "observe", "solve", "export", "verify", "evaluate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a recipe, and its workdir with every stage finished."""
    folder = tmp_path_factory.mktemp("finished")
    calibration = {"data": "scenes", "samples": 4, "keep_statistics": True}
    recipe = write_recipe(
        folder,
        calibration=calibration,
        evaluate={"data": "scenes", "limit": 2, "tasks": ["gqa"]},
        export={"targets": ["hf", "megatron"]},
        stages=list(ALL),
    )
    run(recipe, ALL)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of them, to be damaged: (recipe, workdir)."""
    shutil.copytree(finished / "work", tmp_path / "work")
    tree = yaml.safe_load((finished / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree | {"workdir": f"{tmp_path}/work"}))
    return tmp_path / "recipe.yaml", tmp_path / "work"


def run(recipe, stages, action=run_stages):
    with models.single_rank() as parallel:
        action(RunContext(plan=make_plan(load_recipe(str(recipe))), parallel=parallel), stages)


def scale(path, name, factor):
    """Multiply a tensor of a file."""
    tensors = load_file(path)
    tensors[name] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


def flip(path):
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refusal(folder, name, command):
    line = f"{folder}/{name} was changed after it was written; to make it again: rm -r {folder} && "
    return f"{line}nemo-vlm-ptq {command} RECIPE"


@pytest.mark.parametrize("stages", [("export",), ("verify",)])
def test_a_changed_scale_is_refused_by_what_reads_it(copy, stages):
    recipe, work = copy
    scale(work / "fp8" / "scales" / layer_file(2), "linear_qkv.input_amax", 2)
    if stages == ("export",):
        shutil.rmtree(work / "fp8" / "hf")
    else:
        (work / "fp8" / "verify.json").unlink()
    said = said_by(run, recipe, stages)
    assert said == refusal(work / "fp8" / "scales", layer_file(2), "calibrate")


def test_a_changed_statistic_is_refused_by_solve(copy):
    recipe, work = copy
    scale(work / "statistics" / layer_file(1), "linear_fc1.amax", 3)
    shutil.rmtree(work / "fp8" / "scales")
    said = said_by(run, recipe, ("solve",))
    assert said == refusal(work / "statistics", layer_file(1), "observe")


def test_a_changed_export_is_refused_by_evaluate(copy):
    recipe, work = copy
    (changed,) = (work / "fp8" / "hf").glob("*.safetensors")
    flip(changed)
    shutil.rmtree(work / "fp8" / "evaluate")
    said = said_by(run, recipe, ("evaluate",))
    assert said == refusal(work / "fp8" / "hf", changed.name, "export")


def test_changed_answers_of_the_source_are_refused_by_evaluate(copy):
    recipe, work = copy
    flip(work / "16bit" / "evaluate" / "answers.json")
    shutil.rmtree(work / "fp8" / "evaluate")
    said = said_by(run, recipe, ("evaluate",))
    assert said == refusal(work / "16bit" / "evaluate", "answers.json", "evaluate")


@pytest.mark.parametrize(
    ("form", "folder", "command"),
    [("megatron", "megatron", "import"), ("quantized", "fp8/quantized", "export"),
     ("hf", "fp8/hf", "export")],
)  # fmt: skip
def test_a_changed_checkpoint_is_refused_by_logits(copy, tmp_path, form, folder, command):
    recipe, work = copy
    changed = sorted(
        p for p in (work / folder).iterdir() if p.suffix in (".distcp", ".safetensors")
    )
    flip(changed[0])
    inputs = tmp_path / "inputs.safetensors"
    save_file({"input_ids": models.random_questions([6], (), seed=1)[0].ids[None]}, inputs)
    options = {"from": form, "inputs": str(inputs), "output": str(tmp_path / "out")}
    said = said_by(run, recipe, options, write_logits)
    assert said == refusal(work / folder, changed[0].name, command)


@pytest.mark.parametrize("name", ["statistics", "megatron", "fp8/scales"])
def test_a_folder_without_a_file_of_its_manifest_is_no_finished_one(copy, name):
    recipe, work = copy
    missing = next(iter(store.read_manifest(work / name)["files"]))
    (work / name / missing).unlink()
    stages = {"statistics": "observe", "megatron": "import", "fp8/scales": "solve"}
    said = said_by(run, recipe, (stages[name],))
    assert said.startswith(f"{work / name / missing} is missing; to make it again: rm -r {work}")


def test_the_command_that_is_named_mends_the_folder(copy):
    recipe, work = copy
    before = store.read_manifest(work / "statistics")["files"]
    flip(work / "statistics" / layer_file(0))
    shutil.rmtree(work / "statistics")  # rm -r
    run(recipe, ("observe",))
    assert store.read_manifest(work / "statistics")["files"] == before


def test_files_of_a_progress_record_are_checked_and_others_are_not(tmp_path):
    folder = tmp_path / "fp8" / "scales"
    store.begin_stage(folder, {})
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")
    store.write_progress(folder, {}, {"0": []}, {"a": store.hash_file(folder / "a")})
    assert checked_file(folder, "a").read_text() == "a"
    (folder / "b").write_text("c")
    assert checked_file(folder, "b").read_text() == "c"
    (folder / "a").write_text("x")
    assert said_by(checked_file, folder, "a") == refusal(folder, "a", "calibrate")
    (folder / "a").unlink()
    assert f"{folder}/a is missing; to make it again: " in said_by(checked_file, folder, "a")


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    store.begin_stage(tmp_path / "s", {})
    (tmp_path / "s" / "a").write_text("a")
    files = store.hash_files(tmp_path / "s", ["a"])
    store.finish_stage(tmp_path / "s", stage="observe", settings={}, files=files, facts={})
    hashed = []
    monkeypatch.setattr(
        store, "hash_file", lambda path: hashed.append(path) or files["a"]["sha256"]
    )
    for _ in range(3):
        check_folder(tmp_path / "s", "observe")
    assert len(hashed) == 1


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_no_manifest_is_written_over_files_that_are_not_there(tmp_path, damage):
    folder = tmp_path / "megatron"
    store.begin_stage(folder, {})
    (folder / ".metadata").write_text("index")
    files = store.hash_files(folder, [".metadata"])
    if damage == "cut":
        (folder / ".metadata").write_text("")
    else:
        (folder / ".metadata").unlink()
        assert "run the same command again" in said_by(store.hash_files, folder, [".metadata"])
    finish = {"stage": "import", "settings": {}, "files": files, "facts": {}}
    said = said_by(lambda: store.finish_stage(folder, **finish))
    assert said.endswith("was removed or changed while 'import' ran; run the same command again")
    assert store.read_manifest(folder) is None and not store.is_finished(folder, {})
    store.begin_stage(folder, {})  # the same command mends it
