"""What a run writes: results, and statistics and Megatron checkpoints only where they are asked."""

import shutil

import pytest
from bad_models import TINY, error_message, write_recipe

from nemo_vlm_ptq import commands
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.status import FAILURES_FILE, read_status

LAYERS = [layer_file(layer) for layer in range(4)]
EXPORT = {
    "config.json", "generation_config.json", "manifest.json",
    "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
KEEP = "calibration.keep_statistics=true"


def recipe_of(folder, **keys):
    """Write a recipe of the tiny model for this process."""
    return write_recipe(
        folder,
        TINY,
        parallel={"tensor": 1, "data": 1},
        calibration={"samples": 8, "micro_batch": 2},
        evaluate={"data": None},
        export={"targets": ["compressed_tensors"]},
        **keys,
    )


def run(recipe, *overrides, command="run"):
    """Run a command in this process; return the names of the files in the work folder."""
    assert commands.run_command(command, str(recipe), list(overrides)) == 0
    work = recipe.parent / "work"
    return {str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()}


def below(folder, names):
    return {f"{folder}/{name}" for name in names}


def hashes(folder):
    """Return file -> sha256 of all files but manifests."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): store.hash_file(path) for path in paths}


def results_of(name, target="compressed_tensors", files=EXPORT):
    """Return the files that a format adds."""
    scales = below(f"{name}/scales", [*LAYERS, "manifest.json"])
    return scales | below(f"{name}/{target}", files) | {f"{name}/verify.json"}


REPORT = below("report", ["index.html", "bytes.png"])
ERRORS = {"report/layers.png"}  # of formats with second moments
OBSERVED = {"statistics/manifest.json"}
KEPT = OBSERVED | below("statistics", LAYERS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished run of fp8, and its files."""
    recipe = recipe_of(tmp_path_factory.mktemp("plain"), quantize={"format": ["fp8"]})
    return recipe, run(recipe)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A finished run of int4_awq that kept its statistics, and its files."""
    recipe = recipe_of(tmp_path_factory.mktemp("kept"), quantize={"format": ["int4_awq"]})
    return recipe, run(recipe, KEEP)


@pytest.fixture
def copy(tmp_path):
    """Function that copies a finished run and returns the copy's recipe."""

    def copy(finished):
        shutil.copytree(finished[0].parent / "work", tmp_path / "work")
        return recipe_of(tmp_path, quantize={"format": ["fp8"]})

    return copy


def test_a_run_writes_results_only(plain):
    assert plain[1] == OBSERVED | results_of("fp8") | REPORT


def test_statistics_are_written_if_they_are_kept(kept):
    assert kept[1] == KEPT | results_of("int4_awq") | REPORT | ERRORS
    manifest = store.read_manifest(kept[0].parent / "work" / "statistics")
    assert set(manifest["files"]) == set(LAYERS)
    assert manifest["facts"]["samples"] == 8 and manifest["facts"]["windows"] == 1
    assert manifest["facts"]["tokens"].keys() == {"text", "image"}
    (ids,) = manifest["facts"]["ids_per_rank"]
    assert len(set(ids)) == 8


def test_a_finished_run_is_not_run_again(plain):
    work = plain[0].parent / "work"
    before = {path: path.stat().st_mtime_ns for path in work.glob("*/*/*")}
    assert before and run(plain[0]) == plain[1]
    assert {path: path.stat().st_mtime_ns for path in work.glob("*/*/*")} == before


def test_a_further_format_observes_again_and_leaves_the_first_as_it_is(copy, plain):
    recipe = copy(plain)
    work = recipe.parent / "work"
    first = {part: hashes(work / "fp8" / part) for part in ("scales", "compressed_tensors")}
    times = {path: path.stat().st_mtime_ns for path in (work / "fp8").rglob("*")}
    files = run(recipe, "quantize.format=[fp8, int8_wo]")
    assert files == OBSERVED | results_of("fp8") | results_of("int8_wo") | REPORT
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {part: hashes(work / "fp8" / part) for part in first} == first


def test_a_further_format_is_solved_from_kept_statistics_without_data(copy, kept):
    recipe = copy(kept)
    statistics = recipe.parent / "work" / "statistics"
    times = {path: path.stat().st_mtime_ns for path in statistics.iterdir()}
    files = run(recipe, "quantize.format=int8_sq", "stages=[solve, export]", command="run")
    assert results_of("int8_sq") - files == {"int8_sq/verify.json"}
    assert {path: path.stat().st_mtime_ns for path in statistics.iterdir()} == times
    files = run(recipe, "quantize.format=w4a8_awq", KEEP)  # observe finds the statistics, too
    assert results_of("w4a8_awq") <= files
    assert {path: path.stat().st_mtime_ns for path in statistics.iterdir()} == times


def test_scales_do_not_depend_on_whether_statistics_are_kept(tmp_path, kept):
    recipe = recipe_of(tmp_path, quantize={"format": ["int4_awq"]})
    run(recipe, command="calibrate")
    scales = tmp_path / "work" / "int4_awq" / "scales"
    assert hashes(scales) == hashes(kept[0].parent / "work" / "int4_awq" / "scales")
    for other in (tmp_path / "work", kept[0].parent / "work"):
        assert store.read_manifest(other / "int4_awq" / "scales")["facts"]["layers"]
    shutil.rmtree(scales)
    shutil.rmtree(tmp_path / "work" / "statistics")
    shutil.copytree(kept[0].parent / "work" / "statistics", tmp_path / "work" / "statistics")
    run(recipe, command="solve")  # from the files
    assert hashes(scales) == hashes(kept[0].parent / "work" / "int4_awq" / "scales")


def test_observe_alone_keeps_statistics_for_a_later_solve(tmp_path):
    recipe = recipe_of(tmp_path, quantize={"format": ["fp8"]})
    assert run(recipe, command="observe") == KEPT
    files = run(recipe, command="solve")
    assert files == KEPT | below("fp8/scales", [*LAYERS, "manifest.json"])


def test_solve_without_statistics_says_how_to_get_them(copy, plain):
    recipe = copy(plain)
    statistics = recipe.parent / "work" / "statistics"
    assert error_message("solve", recipe, "quantize.format=int8_wo") == (
        f"{statistics} holds no statistics, which solving int8_wo needs; run observe and solve "
        "together (run, or calibrate), or observe with calibration.keep_statistics=true first"
    )
    shutil.rmtree(statistics)
    assert error_message("solve", recipe, "quantize.format=int8_wo") == (
        f"{statistics} is not finished; run the stage 'observe' first"
    )
    assert not (recipe.parent / "work" / "int8_wo").exists()


def test_statistics_without_second_moments_do_not_serve_a_search(tmp_path):
    recipe = recipe_of(tmp_path, quantize={"format": ["fp8"]})
    run(recipe, command="observe")
    said = error_message("solve", recipe, "quantize.format=int4_awq")
    (recipe.parent / "work" / FAILURES_FILE).unlink()
    assert "which int4_awq needs; run observe with this format in quantize.format" in said
    run(recipe, "quantize.format=int4_awq", command="observe")  # adds them
    files = run(recipe, "quantize.format=[fp8, int4_awq]", command="solve")
    assert files == KEPT | below("fp8/scales", [*LAYERS, "manifest.json"]) | below(
        "int4_awq/scales", [*LAYERS, "manifest.json"]
    )


def test_import_is_run_only_by_name(tmp_path):
    recipe = recipe_of(tmp_path, quantize={"format": ["fp8"]})
    files = run(recipe, command="import")
    assert files and all(name.startswith("megatron/") for name in files)
    assert {"megatron/vision.safetensors", "megatron/.metadata"} <= files


def test_a_megatron_checkpoint_is_an_export_and_a_nemo_checkpoint_is_made_from_it(copy, plain):
    recipe = copy(plain)
    work = recipe.parent / "work"
    files = run(recipe, "export.targets=[megatron]")
    assert {"fp8/quantized/.metadata", "fp8/quantized/manifest.json"} <= files
    assert not (work / "fp8" / "nemo").exists() and not (work / "megatron").exists()
    written = hashes(work / "fp8" / "quantized")
    shutil.rmtree(work / "fp8" / "quantized")
    files = run(recipe, "export.targets=[nemo]")
    assert {"fp8/quantized/manifest.json", "fp8/nemo/manifest.json"} <= files
    assert hashes(work / "fp8" / "quantized") == written
    verified = store.read_json(work / "fp8" / "verify.json")
    assert {check["name"].split()[0] for check in verified["checks"]} == {"megatron", "nemo"}
    status = read_status(work)
    assert status["formats"]["fp8"]["export"] == "finished"


def test_logits_of_forms_that_were_not_written_say_how_they_are(copy, plain, tmp_path):
    import torch

    recipe, inputs = copy(plain), tmp_path / "inputs.safetensors"
    store.save_tensors({"input_ids": torch.tensor([[7, 8, 9]])}, inputs)
    words = (f"inputs={inputs}", f"output={tmp_path / 'out'}")
    work = recipe.parent / "work"
    assert error_message("logits", recipe, "from=megatron", *words) == (
        f"{work}/megatron is not finished; run import first"
    )
    assert error_message("logits", recipe, "from=quantized", *words) == (
        f"{work}/fp8/quantized is not finished; run export with megatron in export.targets first"
    )
    assert not (tmp_path / "out").exists()


def test_a_target_is_written_after_the_one_that_it_is_made_from(tmp_path):
    recipe = str(write_recipe(tmp_path, TINY))
    for targets, expected in (
        ("nemo", ["megatron", "nemo"]),
        ("nemo, hf, megatron", ["megatron", "nemo", "hf"]),
        ("hf, megatron", ["hf", "megatron"]),
    ):
        plan = make_plan(load_recipe(recipe, [f"export.targets=[{targets}]"]))
        (fmt,) = plan.formats
        assert plan.targets(fmt) == expected
        readable = [target for target in expected if target != "megatron"]
        assert plan.readable_targets(fmt) == readable
