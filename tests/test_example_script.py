"""launch/*.sh: translation of example-script options into recipe keys, and rejected arguments."""

import json
import re

import pytest
import scripts
from bad_models import ROOT, TINY
from engines import install

from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.targets.trtllm.engine.commands import check_engine
from nemo_vlm_ptq.workdir import store

NAME = "huggingface_example.sh"
REQUIRED = (
    "--type", "llava", "--model", "dir/LLaVA-1.5.7b", "--calib_dataset", "gqa", "--quant",
)  # fmt: skip
STAGES = ("observe", "solve", "export", "verify")
EXAMPLE_OPTIONS = (
    "type", "model", "quant", "kv_cache_quant", "tp", "pp", "calib_tp", "calib", "calib_dataset",
    "calib_batch_size", "sparsity", "awq_block_size", "effective_bits", "auto_quantize_bits",
    "input", "output", "batch", "tasks", "export_fmt", "lm_eval_tasks", "lm_eval_limit",
    "simple_eval_tasks", "num_samples", "trust_remote_code", "use_seq_device_map",
    "gpu_max_mem_percentage", "low_memory_mode", "no-verbose", "kv_cache_free_gpu_memory_fraction",
)  # fmt: skip


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """A virtual environment whose nemo-vlm-ptq prints its arguments as JSON."""
    venv = scripts.make_venv(tmp_path_factory.mktemp("venv"))
    echo = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = venv / "bin" / "nemo-vlm-ptq"
    command.write_text(f"#!/bin/sh\nexec {venv}/bin/python -c '{echo}' \"$@\"\n")
    return venv


def translated(venv, folder, *args, **variables):
    """Return the recipe that the script runs, and its stderr."""
    code, out, err = scripts.run(NAME, venv, folder, *args, **variables)
    assert code == 0, err
    command, path, *overrides = json.loads(out)
    assert (command, path) == ("run", str(ROOT / "launch" / "huggingface_example.yaml"))
    return load_recipe(path, overrides), err


def error_line(venv, folder, *args, script=NAME, **variables):
    """Return the error line of a script that exits without running anything."""
    code, out, err = scripts.run(script, venv, folder, *args, **variables)
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


def test_defaults_match_the_example_script(venv, tmp_path):
    recipe, _ = translated(venv, tmp_path, *REQUIRED, "fp8")
    assert (recipe.model, recipe.family) == ("dir/LLaVA-1.5.7b", "llava")
    assert recipe.workdir == f"{tmp_path}/saved_models_LLaVA-1_5_7b_dense_fp8_tp1_pp1"
    assert recipe.stages == (*STAGES, "build", "report")
    assert (recipe.quantize.format, recipe.quantize.kv_cache) == (("fp8",), "fp8")
    assert (recipe.calibration.samples, recipe.calibration.micro_batch) == (512, 16)
    assert (recipe.export.targets, recipe.export.tensor) == (("trtllm",), 1)
    engine = recipe.engine
    assert (engine.max_batch_size, engine.max_input_len, engine.max_seq_len) == (20, 1024, 1536)
    assert engine.kv_cache_free_gpu_memory_fraction == 0.8


def test_supported_options_set_recipe_keys(venv, tmp_path):
    recipe, err = translated(
        venv, tmp_path, "--type=phi", "--model", "m", "--quant", "int4_awq", "--tp", "2", "--pp=4",
        "--calib", "64", "--calib_batch_size", "4", "--calib_dataset", "gqa", "--calib_tp", "8",
        "--kv_cache_quant", "int8", "--awq_block_size", "64", "--batch", "3", "--input", "500",
        "--output", "50", "--kv_cache_free_gpu_memory_fraction", "0.5", "--sparsity", "dense",
        "--tasks", "build,gqa", "evaluate.data=there", "evaluate.limit=9", ROOT_SAVE_PATH="/saved",
    )  # fmt: skip
    assert (
        recipe.family == "phi" and recipe.workdir == "/saved/saved_models_m_dense_int4_awq_tp2_pp4"
    )
    assert recipe.stages == (*STAGES, "build", "evaluate", "report")
    assert (recipe.quantize.kv_cache, recipe.quantize.group_size) == ("int8", 64)
    assert (recipe.export.tensor, recipe.export.pipeline, recipe.parallel.tensor) == (2, 4, 8)
    calibration = recipe.calibration
    assert (calibration.samples, calibration.micro_batch, calibration.data) == (64, 4, "gqa")
    engine = recipe.engine
    assert (engine.max_batch_size, engine.max_input_len, engine.max_seq_len) == (3, 500, 550)
    assert engine.kv_cache_free_gpu_memory_fraction == 0.5
    assert (recipe.evaluate.form, recipe.evaluate.data, recipe.evaluate.limit) == (
        "engine", "there", 9
    )  # fmt: skip
    assert err.startswith("+ exec ")  # nothing was ignored


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("int8_sq",), {"kv_cache": "none"}),
        (("int8_smoothquant",), {"kv_cache": "none"}),
        (("int8_sq", "--kv_cache_quant", "fp8"), {"kv_cache": "fp8"}),
        (("fp8", "--kv_cache_quant", ""), {"kv_cache": "fp8"}),  # an empty value means the default
        (("fp8", "--calib_batch_size", "0"), {"micro_batch": 16}),  # 0 means the default
        (("fp8", "--tasks", "quant"), {"stages": (*STAGES, "report")}),
        (("fp8", "--export_fmt", "hf"), {"targets": ("hf",), "stages": (*STAGES, "report")}),
        (("fp8", "--tasks=gqa", "evaluate.data=x"),
         {"stages": (*STAGES, "evaluate", "report"), "form": "export"}),
    ],
)  # fmt: skip
def test_defaults_depend_on_other_options(venv, tmp_path, args, expected):
    recipe, _ = translated(venv, tmp_path, *REQUIRED, *args)
    sections = (recipe, recipe.quantize, recipe.calibration, recipe.export, recipe.evaluate)
    found = {key: value for section in sections for key, value in section}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("fmt", ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"])
@pytest.mark.parametrize("family", ["llava", "vila", "phi"])
def test_formats_of_the_example_script_plan_for_each_type(venv, tmp_path, family, fmt):
    options = ("--type", family, "--model", ROOT / "assets" / f"tiny-{family}", "--quant", fmt)
    options = (*options, "--calib_dataset", "scenes")
    options = (*options, "--tp", "2", f"engine.vila_path={ROOT}")
    plan = make_plan(translated(venv, tmp_path, *options)[0])
    check_engine(plan)
    assert plan.targets(plan.formats[0]) == ["trtllm"]


def test_ignored_options_are_reported_with_a_reason(venv, tmp_path):
    flags = ("--trust_remote_code", "--use_seq_device_map", "--low_memory_mode", "--no-verbose")
    _, err = translated(venv, tmp_path, *REQUIRED, "fp8", *flags, "--gpu_max_mem_percentage", "0.8")
    for flag in (*flags, "--gpu_max_mem_percentage"):
        assert f"{flag} is ignored: " in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--quant", "fp8", "--type", "llava"), "required option --model is missing"),
        ((*REQUIRED, ""), "required option --quant is missing"),
        ((*REQUIRED, "fp8", "--wat"), "unknown option --wat; supported: --awq_block_size --batch "),
        ((*REQUIRED, "fp8", "-tp", "2"), "unexpected argument '-tp'; expected an option or k"),
        ((*REQUIRED, "fp8", "--tp"), "--tp requires a value"),
        ((*REQUIRED, "fp8", "--sparsity", "sparsegpt"), "--sparsity must be dense, got 'sp"),
        ((*REQUIRED, "fp8", "--auto_quantize_bits", "5"), "--auto_quantize_bits is not supported"),
        ((*REQUIRED, "fp8", "--tasks", "build,mmlu"),
         "--tasks must be a list of quant, build, gqa, got 'mmlu': text-only tasks are not "),
        ((*REQUIRED, "fp8", "--tasks", "gqa"), "--tasks gqa requires evaluate.data=DIR, "),
        ((*REQUIRED, "fp8", "--export_fmt", "onnx"),
         "--export_fmt must be tensorrt_llm or hf, got 'onnx'"),
        ((*REQUIRED, "fp8", "--input", "many"), "--input must be a positive integer, got 'many'"),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected_with_the_supported_ones(venv, tmp_path, args, message):
    assert error_line(venv, tmp_path, *args).startswith(message)


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("run.sh", {"NNODES": "two"}, "NNODES must be a positive integer, got 'two'"),
        ("run.sh", {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE must be a positive integer, got '0'"),
        ("run.sh", {"NNODES": "2"}, "NODE_RANK must be 0 to 1 with NNODES=2, got ''"),
        ("run.sh", {"NNODES": "2", "NODE_RANK": "2"},
         "NODE_RANK must be 0 to 1 with NNODES=2, got '2'"),
        ("run.sh", {"NNODES": "2", "NODE_RANK": "1"},
         "MASTER_ADDR must be set to the address of machine 0 with NNODES=2"),
        ("mpirun.sh", {"NNODES": "0"}, "NNODES must be a positive integer, got '0'"),
        ("mpirun.sh", {"PATH": "/none:/bin"}, "Open MPI's mpirun is not on PATH"),
    ],
)  # fmt: skip
def test_invalid_launch_settings_are_rejected(venv, tmp_path, script, variables, message):
    if "PATH" in variables:
        (tmp_path / "mpirun").write_text("#!/bin/sh\necho HYDRA build details\n")
        (tmp_path / "mpirun").chmod(0o755)
        variables = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    line = error_line(venv, tmp_path, "plan", "quickstart", script=script, **variables)
    assert line.startswith(message)


def test_an_outdated_environment_is_rejected_with_several_machines(tmp_path):
    outdated = scripts.make_venv(tmp_path)
    (outdated / ".nemo-vlm-ptq").write_text("0 base\n")
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "here"}
    line = error_line(outdated, tmp_path, "run", "quickstart", script="run.sh", **variables)
    assert line.startswith(f"{outdated} is out of date and cannot be updated with NNODES > 1")


def test_docs_list_every_option_of_the_example_script():
    text = (ROOT / "docs" / "clusters.md").read_text()
    rows = [re.findall(r"`--([\w-]+)", line.split("|")[1]) for line in text.splitlines()
            if line.startswith("| `--")]  # fmt: skip
    assert sorted(name for row in rows for name in row) == sorted(EXAMPLE_OPTIONS)
    script = (ROOT / "launch" / NAME).read_text()
    assert not [name for name in EXAMPLE_OPTIONS if not re.search(rf"[\[( ]{name}[\]) ]", script)]


def test_all_stages_run_on_a_small_model_and_evaluate_its_engine(tmp_path, monkeypatch):
    install(tmp_path / "trt", monkeypatch)
    monkeypatch.setenv("FAKE_TOWER", "[64, 256]")  # image tokens, hidden
    venv = scripts.make_venv(tmp_path)
    code, out, err = scripts.run(
        NAME, venv, tmp_path, "--type", "llava", "--model", TINY, "--quant", "int8_sq",
        "--calib", "8", "--calib_dataset", "scenes", "--tasks", "build,gqa",
        "evaluate.data=scenes", "evaluate.limit=16",
        "evaluate.tasks=[gqa]",  # the fake TensorRT-LLM ignores images
    )  # fmt: skip
    assert code == 0, err[-3000:]
    work = tmp_path / "saved_models_tiny-llava_dense_int8_sq_tp1_pp1" / "int8_sq"
    assert store.read_json(work / "verify.json")["passed"]
    assert store.read_manifest(work / "engine")["settings"]["max_batch_size"] == 20
    assert store.read_json(work / "evaluate" / "gqa.json")["accuracy"]["total"] == 16
    assert "int8_sq" in out
