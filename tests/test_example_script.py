"""launch/huggingface_example.sh and its neighbours: what options become, and what is refused."""

import json
import re

import pytest
import scripts
from bad_models import ROOT, TINY
from engines import install

from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.targets.trtllm.engine.commands import check_engine
from nemo_vlm_ptq.workdir import store

NAME = "huggingface_example.sh"
NEEDED = ("--type", "llava", "--model", "dir/LLaVA-1.5.7b", "--quant")
STAGES = ("import", "observe", "solve", "export", "verify")
OLD = (
    "type", "model", "quant", "kv_cache_quant", "tp", "pp", "calib_tp", "calib", "calib_dataset",
    "calib_batch_size", "sparsity", "awq_block_size", "effective_bits", "auto_quantize_bits",
    "input", "output", "batch", "tasks", "export_fmt", "lm_eval_tasks", "lm_eval_limit",
    "simple_eval_tasks", "num_samples", "trust_remote_code", "use_seq_device_map",
    "gpu_max_mem_percentage", "low_memory_mode", "no-verbose", "kv_cache_free_gpu_memory_fraction",
)  # fmt: skip


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """An environment whose command says what it was told."""
    venv = scripts.make_venv(tmp_path_factory.mktemp("venv"))
    say = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = venv / "bin" / "nemo-vlm-ptq"
    command.write_text(f"#!/bin/sh\nexec {venv}/bin/python -c '{say}' \"$@\"\n")
    return venv


def told(venv, folder, *words, **settings):
    """The recipe that the script runs, and its stderr."""
    code, out, err = scripts.run(NAME, venv, folder, *words, **settings)
    assert code == 0, err
    command, path, *overrides = json.loads(out)
    assert (command, path) == ("run", str(ROOT / "launch" / "huggingface_example.yaml"))
    return load_recipe(path, overrides), err


def refused(venv, folder, *words, script=NAME, **settings):
    """What a script says, having done nothing."""
    code, out, err = scripts.run(script, venv, folder, *words, **settings)
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


def test_without_more_options_it_does_what_the_old_one_did(venv, tmp_path):
    recipe, _ = told(venv, tmp_path, *NEEDED, "fp8")
    assert (recipe.model, recipe.family) == ("dir/LLaVA-1.5.7b", "llava")
    assert recipe.workdir == f"{tmp_path}/saved_models_LLaVA-1_5_7b_dense_fp8_tp1_pp1"
    assert recipe.stages == (*STAGES, "build", "report")
    assert (recipe.quantize.format, recipe.quantize.kv_cache) == (("fp8",), "fp8")
    assert (recipe.calibration.samples, recipe.calibration.micro_batch) == (512, 16)
    assert (recipe.export.targets, recipe.export.tensor) == (("trtllm",), 1)
    engine = recipe.engine
    assert (engine.max_batch_size, engine.max_input_len, engine.max_seq_len) == (20, 1024, 1536)
    assert engine.kv_cache_free_gpu_memory_fraction == 0.8


def test_every_option_that_stayed_reaches_the_recipe(venv, tmp_path):
    recipe, err = told(
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
    wanted = recipe.calibration
    assert (wanted.samples, wanted.micro_batch, wanted.data) == (64, 4, "gqa")
    engine = recipe.engine
    assert (engine.max_batch_size, engine.max_input_len, engine.max_seq_len) == (3, 500, 550)
    assert engine.kv_cache_free_gpu_memory_fraction == 0.5
    assert (recipe.evaluate.form, recipe.evaluate.data, recipe.evaluate.limit) == (
        "engine", "there", 9
    )  # fmt: skip
    assert err.startswith("+ exec ")  # nothing was ignored


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("int8_sq",), {"kv_cache": "none"}),
        (("int8_smoothquant",), {"kv_cache": "none"}),
        (("int8_sq", "--kv_cache_quant", "fp8"), {"kv_cache": "fp8"}),
        (("fp8", "--kv_cache_quant", ""), {"kv_cache": "fp8"}),  # an empty value is none
        (("fp8", "--calib_batch_size", "0"), {"micro_batch": 16}),  # 0: choose
        (("fp8", "--tasks", "quant"), {"stages": (*STAGES, "report")}),
        (("fp8", "--export_fmt", "hf"), {"targets": ("hf",), "stages": (*STAGES, "report")}),
        (("fp8", "--tasks=gqa", "evaluate.data=x"),
         {"stages": (*STAGES, "evaluate", "report"), "form": "export"}),
    ],
)  # fmt: skip
def test_what_an_option_leaves_open_is_chosen_as_before(venv, tmp_path, words, expected):
    recipe, _ = told(venv, tmp_path, *NEEDED, *words)
    parts = (recipe, recipe.quantize, recipe.calibration, recipe.export, recipe.evaluate)
    found = {key: value for part in parts for key, value in part}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("fmt", ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"])
@pytest.mark.parametrize("family", ["llava", "vila", "phi"])
def test_every_format_of_the_old_script_plans_for_every_type(venv, tmp_path, family, fmt):
    options = ("--type", family, "--model", ROOT / "assets" / f"tiny-{family}", "--quant", fmt)
    plan = make_plan(told(venv, tmp_path, *options, "--tp", "2", f"engine.vila_path={ROOT}")[0])
    check_engine(plan)
    assert plan.targets(plan.formats[0]) == ["trtllm"]


def test_what_is_ignored_is_said_with_a_reason(venv, tmp_path):
    flags = ("--trust_remote_code", "--use_seq_device_map", "--low_memory_mode", "--no-verbose")
    _, err = told(venv, tmp_path, *NEEDED, "fp8", *flags, "--gpu_max_mem_percentage", "0.8")
    for flag in (*flags, "--gpu_max_mem_percentage"):
        assert f"{flag} is ignored: " in err
    assert "calibrating on drawn scenes: --calib_dataset DIR" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quant", "fp8", "--type", "llava"), "--model is missing"),
        ((*NEEDED, ""), "--quant is missing"),
        ((*NEEDED, "fp8", "--wat"), "unknown option --wat; known: --awq_block_size --batch "),
        ((*NEEDED, "fp8", "-tp", "2"), "-tp is neither an option nor key=value of a recipe"),
        ((*NEEDED, "fp8", "--tp"), "--tp needs a value"),
        ((*NEEDED, "fp8", "--sparsity", "sparsegpt"), "--sparsity sparsegpt is gone: weights stay"),
        ((*NEEDED, "fp8", "--auto_quantize_bits", "5"), "--auto_quantize_bits is gone: "),
        ((*NEEDED, "fp8", "--tasks", "build,mmlu"),
         "--tasks mmlu: tasks of text alone are gone; gqa asks about images; known: quant, "),
        ((*NEEDED, "fp8", "--tasks", "gqa"), "--tasks gqa needs GQA: add evaluate.data=DIR, "),
        ((*NEEDED, "fp8", "--export_fmt", "onnx"), "--export_fmt onnx is unknown; known: tensorrt"),
        ((*NEEDED, "fp8", "--input", "many"), "--input many is no number of tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_can(venv, tmp_path, words, said):
    assert refused(venv, tmp_path, *words).startswith(said)


@pytest.mark.parametrize(
    ("script", "settings", "said"),
    [
        ("run.sh", {"NNODES": "two"}, "NNODES=two is no number of machines"),
        ("run.sh", {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0 is no number of ranks"),
        ("run.sh", {"NNODES": "2"}, "NODE_RANK= is not one of 0 to 1, with NNODES=2"),
        ("run.sh", {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 is not one of 0 to 1, with "),
        ("run.sh", {"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set; with NNODES=2 it "),
        ("mpirun.sh", {"NNODES": "0"}, "NNODES=0 is no number of machines"),
        ("mpirun.sh", {"PATH": "/none:/bin"}, "no mpirun of Open MPI on PATH"),
    ],
)
def test_ranks_that_cannot_be_started_are_refused(venv, tmp_path, script, settings, said):
    if "PATH" in settings:
        (tmp_path / "mpirun").write_text("#!/bin/sh\necho HYDRA build details\n")
        (tmp_path / "mpirun").chmod(0o755)
        settings = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    line = refused(venv, tmp_path, "plan", "quickstart", script=script, **settings)
    assert line.startswith(said)


def test_machines_do_not_install_into_one_environment_at_once(tmp_path):
    old = scripts.make_venv(tmp_path)
    (old / ".nemo-vlm-ptq").write_text("0 base\n")
    settings = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "here"}
    line = refused(old, tmp_path, "run", "quickstart", script="run.sh", **settings)
    assert line.startswith(f"{old} is not up to date, and several machines must not install into")


def test_the_table_in_the_docs_tells_of_every_option_of_the_old_script():
    text = (ROOT / "docs" / "launching.md").read_text()
    rows = [re.findall(r"`--([\w-]+)", line.split("|")[1]) for line in text.splitlines()
            if line.startswith("| `--")]  # fmt: skip
    assert sorted(name for row in rows for name in row) == sorted(OLD)
    script = (ROOT / "launch" / NAME).read_text()
    assert not [name for name in OLD if not re.search(rf"[\[( ]{name}[\]) ]", script)]


def test_the_whole_line_runs_on_a_little_model_and_asks_its_engine(tmp_path, monkeypatch):
    install(tmp_path / "trt", monkeypatch)
    monkeypatch.setenv("FAKE_TOWER", "[64, 256]")  # image tokens, hidden
    venv = scripts.make_venv(tmp_path)
    code, out, err = scripts.run(
        NAME, venv, tmp_path, "--type", "llava", "--model", TINY, "--quant", "int8_sq",
        "--calib", "8", "--tasks", "build,gqa", "evaluate.data=scenes", "evaluate.limit=16",
        "evaluate.tasks=[gqa]",  # TensorRT-LLM's place-holder does not look
    )  # fmt: skip
    assert code == 0, err[-3000:]
    work = tmp_path / "saved_models_tiny-llava_dense_int8_sq_tp1_pp1" / "int8_sq"
    assert store.read_json(work / "verify.json")["passed"]
    assert store.read_manifest(work / "engine")["settings"]["max_batch_size"] == 20
    assert store.read_json(work / "evaluate" / "gqa.json")["accuracy"]["total"] == 16
    assert "int8_sq" in out
