"""What TensorRT-LLM is told: only options that it has, and for each format and family the right."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bad_models import ROOT, refusal, write_recipe
from engines import install, plan_for
from test_cli import call

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.plan import make_plan, supported_targets
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.targets.trtllm.engine import installation as installed
from nemo_vlm_ptq.targets.trtllm.engine.commands import (
    VISION_BUILDER,
    build_script,
    engine_commands,
)

TABLE = json.loads((Path(__file__).parent / "trtllm_options.json").read_text())
BUILT = [name for name, row in FORMATS.items() if "trtllm" in row.targets]
MISSING = "engines need TensorRT-LLM, whose trtllm-build is not on PATH; "
WORKS = "versions 0.18 to 1.2.1 work, later ones have no engines; "
DRY = "`nemo-vlm-ptq build RECIPE --dry-run` prints the commands"


def options(words):
    """Option -> value of the words behind a program; None for a flag."""
    found, words = {}, list(words)
    while words:
        name = words.pop(0)
        assert name.startswith("--") and name not in found
        found[name[2:]] = words.pop(0) if words and not words[0].startswith("--") else None
    return found


def told(plan):
    """(options of trtllm-build, options of the vision builder or None) of a plan of one format."""
    (fmt,) = plan.formats
    decoder, *rest = engine_commands(plan, fmt)
    assert decoder.words[0] == "trtllm-build" and decoder.name == "llm"
    if not rest:
        return options(decoder.words[1:]), None
    (vision,) = rest
    assert vision.words[:3] == ("python3", "-c", VISION_BUILDER) and vision.name == "vision"
    return options(decoder.words[1:]), options(vision.words[3:])


def fits(value, kind):
    """A value is one that an option of the table takes."""
    if kind == "flag":
        return value is None
    if isinstance(kind, list):
        return value in kind
    return value is not None and (kind == "str" or value.isdecimal())


def layouts(family):
    """(tensor, pipeline) to build for; Phi-3 has no pipeline in TensorRT-LLM."""
    return [(1, 1), (2, 1)] if family == "phi" else [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("family", ["llava", "vila", "phi"])
def test_every_option_and_value_is_one_of_the_table(tmp_path, family):
    seen = set()
    for fmt in BUILT:
        for kv_cache in ("none", "fp8", "int8"):
            if "trtllm" not in supported_targets(FORMATS[fmt], kv_cache):
                continue
            for tensor, pipeline in layouts(family):
                for batch, logits in ((1, True), (8, False)):
                    engine = {"max_batch_size": batch, "context_logits": logits}
                    plan = plan_for(family, tmp_path, fmt, tensor, pipeline,
                                    kv_cache=kv_cache, engine=engine)  # fmt: skip
                    decoder, vision = told(plan)
                    for program, given in (("trtllm-build", decoder),
                                           ("multimodal_builder", vision or {})):  # fmt: skip
                        for name, value in given.items():
                            assert fits(value, TABLE[program][name]), (program, name, value)
                            seen.add(name)
    assert {"gemm_plugin", "gather_context_logits", "workers"} <= seen


def test_the_commands_of_a_llava_word_by_word(tmp_path):
    plan = plan_for("llava", tmp_path, "fp8", tensor=2, engine={"max_batch_size": 4})
    home = tmp_path / "fp8"
    assert told(plan) == (
        {
            "checkpoint_dir": f"{home}/trtllm/llm",
            "output_dir": f"{home}/engine/llm",
            "input_timing_cache": f"{tmp_path}/timing.cache",
            "output_timing_cache": f"{tmp_path}/timing.cache",
            "workers": "2",
            "max_batch_size": "4",
            "max_input_len": "4096",
            "max_seq_len": "4608",
            "max_num_tokens": "16384",
            "max_multimodal_len": str(4 * 64),
            "kv_cache_type": "paged",
            "use_paged_context_fmha": "enable",
            "use_fused_mlp": "enable",
            "reduce_fusion": "enable",
            "gemm_plugin": "fp8",
        },
        {
            "model_type": "llava",
            "model_path": f"{ROOT}/assets/tiny-llava",
            "output_dir": f"{home}/engine/vision",
            "max_batch_size": "4",
        },
    )


@pytest.mark.parametrize(
    ("fmt", "batch", "gemm", "fused"),
    [
        ("fp8", 4, "fp8", "enable"),
        ("fp8", 5, None, "enable"),
        ("int8_sq", 1, None, "disable"),
        ("int4_awq", 1, "auto", "disable"),
        ("w4a8_awq", 1, "auto", "disable"),
        ("nvfp4", 1, "nvfp4", "disable"),
    ],
)
def test_plugins_are_those_of_the_format(tmp_path, fmt, batch, gemm, fused):
    plan = plan_for("llava", tmp_path, fmt, engine={"max_batch_size": batch})
    decoder, _ = told(plan)
    assert (decoder.get("gemm_plugin"), decoder["use_fused_mlp"]) == (gemm, fused)
    phi, _ = told(plan_for("phi", tmp_path, fmt, engine={"max_batch_size": batch}))
    assert (phi.get("gemm_plugin"), phi["use_fused_mlp"]) == (gemm, "disable")


@pytest.mark.parametrize("fmt", BUILT)
def test_prompts_attend_to_a_paged_cache_only_where_kernels_take_its_numbers(tmp_path, fmt):
    for kv_cache in ("none", "fp8", "int8"):
        if "trtllm" in supported_targets(FORMATS[fmt], kv_cache):
            decoder, _ = told(plan_for("llava", tmp_path, fmt, kv_cache=kv_cache))
            paged = fmt in ("fp8", "w4a8_awq", "nvfp4") and kv_cache != "int8"
            assert decoder["use_paged_context_fmha"] == ("enable" if paged else "disable")


@pytest.mark.parametrize(("family", "room"), [("llava", 64), ("vila", 25), ("phi", 1024)])
def test_a_request_has_room_for_the_image_tokens_of_its_family(tmp_path, family, room):
    lengths = {"max_batch_size": 3, "max_input_len": 1024, "max_seq_len": 1100}
    decoder, vision = told(plan_for(family, tmp_path, engine=lengths))
    assert decoder["max_multimodal_len"] == str(3 * room)
    assert decoder["max_num_tokens"] == str(3 * 1024)
    assert (vision is None) == (family == "phi")
    assert family != "vila" or vision["vila_path"] == str(ROOT)


def test_a_llava_next_has_an_engine_for_tiles_and_room_for_any_number_of_them(tmp_path):
    plan = replace(plan_for("llava", tmp_path), family=FAMILIES["llava_next"])
    decoder, vision = told(plan)
    assert decoder["max_multimodal_len"] == str(8 * 4096) and vision["model_type"] == "llava_next"


def test_phi_has_no_vision_engine_and_the_script_says_so(tmp_path):
    lines = build_script(plan_for("phi", tmp_path, "int4_awq")).splitlines()
    assert lines[0] == "# int4_awq: llm" and shlex.split(lines[1])[0] == "trtllm-build"
    assert lines[2:] == ["# int4_awq: no vision engine: TensorRT-LLM runs phi's tower with torch"]


def test_a_dry_run_prints_commands_of_every_format_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    recipe = write_recipe(tmp_path, quantize={"format": ["fp8", "int8_sq"]})
    code, out, err = call(capsys, "build", recipe, "--dry-run", "engine.max_batch_size=2")
    assert (code, err) == (0, "")
    assert out == build_script(load(recipe, "engine.max_batch_size=2"))
    assert out.count("trtllm-build") == 2 and out.count("--model_type llava") == 2
    assert not (tmp_path / "work").exists()
    assert refusal("run", recipe, "--dry-run").startswith("--dry-run is an option of build")


def load(recipe, *words):
    """The plan of a recipe file."""
    return make_plan(load_recipe(str(recipe), words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export.targets=[hf]"],
         "format fp8 gets no TensorRT-LLM checkpoint to build an engine from; leave it out of "
         "quantize.format, or add trtllm to export.targets where `formats` has it"),
        (["engine.max_input_len=63"],
         "engine.max_input_len=63 does not hold an image of 64 tokens"),
        (["engine.max_seq_len=4096"],
         "engine.max_seq_len=4096 leaves no token for an answer; it must be more than "
         "engine.max_input_len=4096"),
        (["model=assets/tiny-vila"],
         "family vila: its vision engine is built with VILA's own code; set "
         "engine.vila_path=FOLDER to a clone of it at commit ec7fb2c2"),
    ],
)  # fmt: skip
def test_engines_that_cannot_work_are_refused_by_the_plan(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(ROOT)
    recipe = write_recipe(tmp_path)
    stages = "stages=[import, build]"
    for command in (["build"], ["build", "--dry-run"], ["run", stages], ["plan", stages]):
        assert refusal(command[0], recipe, *command[1:], *words) == said
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["build"],
        ["run", "stages=[import, observe, solve, export, build]"],
        ["evaluate", "from=engine"],
        ["run", "evaluate.from=engine"],
        ["logits", "from=engine", "inputs=x", "output=y"],
    ],
)
def test_without_tensorrt_llm_a_line_says_what_works_before_any_work(tmp_path, monkeypatch, words):
    monkeypatch.setenv("PATH", "/nowhere")
    assert refusal(words[0], write_recipe(tmp_path), *words[1:]) == MISSING + WORKS + DRY
    assert not (tmp_path / "work").exists()


def test_without_the_stage_nobody_asks_for_tensorrt_llm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    recipe = write_recipe(tmp_path)
    assert "build" not in load_recipe(str(recipe)).stages
    assert call(capsys, "plan", recipe, "stages=[import, build]")[0] == 0


@pytest.mark.parametrize("version", ["1.3.0rc1", "1.2.2", "0.17.0", "2.0.0", "nonsense"])
def test_a_version_that_builds_no_engines_is_refused(tmp_path, monkeypatch, version):
    install(tmp_path / "trt", monkeypatch, version)
    said = refusal("build", write_recipe(tmp_path))
    path = tmp_path / "trt" / "bin" / "trtllm-build"
    assert said == f"{path} is of TensorRT-LLM {version}; {WORKS}{DRY}"


@pytest.mark.parametrize("version", ["1.2.1", "1.2.0rc2", "1.0.0", "0.18.0"])
def test_versions_that_build_engines_are_found(tmp_path, monkeypatch, version):
    install(tmp_path / "trt", monkeypatch, version)
    found = installed.find_builder(plan_for("llava", tmp_path))
    assert found.version == version and found.path == str(tmp_path / "trt/bin/trtllm-build")


def test_vilas_code_must_be_there_when_it_is_needed(tmp_path, monkeypatch):
    install(tmp_path / "trt", monkeypatch)
    plan = plan_for("vila", tmp_path, engine={"vila_path": "/nowhere/VILA"})
    assert "--vila_path /nowhere/VILA" in build_script(plan)  # it may be there in the container
    with pytest.raises(UserError, match=r"^engine.vila_path=/nowhere/VILA is no folder"):
        installed.find_builder(plan)


def test_a_gpu_without_the_numbers_of_a_format_is_refused(tmp_path, monkeypatch):
    install(tmp_path / "trt", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    installed.find_builder(plan_for("llava", tmp_path, "w4a8_awq"))
    with pytest.raises(UserError) as caught:
        installed.find_builder(plan_for("llava", tmp_path, "nvfp4"))
    assert str(caught.value) == (
        "format nvfp4 needs a GPU of compute capability 10.0 or more, and NVIDIA H100 has 9.0; "
        "these formats work: fp8, int8_sq, int4_awq, w4a8_awq"
    )
