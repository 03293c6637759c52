"""Commands that build engines: options of TensorRT-LLM, by format and family, and checks."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bad_models import ROOT, error_message, write_recipe
from engines import install, plan_for
from test_cli import call

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.targets.registry import TARGETS, supported_targets
from nemo_vlm_ptq.targets.trtllm.engine.commands import (
    VISION_BUILDER,
    build_script,
    engine_commands,
)
from nemo_vlm_ptq.targets.trtllm.engine.installation import find_installation

# Program -> option -> type, flag or list of choices.
OPTIONS = json.loads((Path(__file__).parent / "trtllm_options.json").read_text())
FORMAT_NAMES = [name for name in FORMATS if name in TARGETS["trtllm"].formats]
NOT_ON_PATH = "engines require TensorRT-LLM, but trtllm-build is not on PATH; "
SUPPORTED = "supported: versions 0.18 to 1.2.1, later ones build no engines; "
DRY_RUN_HINT = "`nemo-vlm-ptq build RECIPE --dry-run` prints the commands"


def engine_recipe(folder, **keys):
    """Write a recipe that exports TensorRT-LLM checkpoints and uses synthetic scenes."""
    return write_recipe(
        folder,
        calibration={"data": "scenes"},
        evaluate={"data": "scenes"},
        export={"targets": ["trtllm"]},
        **keys,
    )


def parse_options(args):
    """Return values by option of a command line; None for a flag."""
    options, args = {}, list(args)
    while args:
        name = args.pop(0)
        assert name.startswith("--") and name not in options
        options[name[2:]] = args.pop(0) if args and not args[0].startswith("--") else None
    return options


def command_options(plan):
    """Return options of trtllm-build and of the vision builder, or None, for one format."""
    (fmt,) = plan.formats
    decoder, *rest = engine_commands(plan, fmt)
    assert decoder.args[0] == "trtllm-build" and decoder.name == "llm"
    if not rest:
        return parse_options(decoder.args[1:]), None
    (vision,) = rest
    assert vision.args[:3] == ("python3", "-c", VISION_BUILDER) and vision.name == "vision"
    return parse_options(decoder.args[1:]), parse_options(vision.args[3:])


def is_valid(value, kind):
    """Return whether a value is of an option's type or one of its choices."""
    if kind == "flag":
        return value is None
    if isinstance(kind, list):
        return value in kind
    return value is not None and (kind == "str" or value.isdecimal())


def layouts(family):
    """Return (tensor, pipeline) layouts; TensorRT-LLM's Phi-3 has no pipeline parallelism."""
    return [(1, 1), (2, 1)] if family == "phi" else [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("family", ["llava", "vila", "phi"])
def test_options_and_values_exist_in_trtllm(tmp_path, family):
    seen = set()
    for fmt in FORMAT_NAMES:
        for kv_cache in ("none", "fp8", "int8"):
            if "trtllm" not in supported_targets(FORMATS[fmt], kv_cache):
                continue
            for tensor, pipeline in layouts(family):
                for batch, logits in ((1, True), (8, False)):
                    engine = {"max_batch_size": batch, "context_logits": logits}
                    plan = plan_for(family, tmp_path, fmt, tensor, pipeline,
                                    kv_cache=kv_cache, engine=engine)  # fmt: skip
                    decoder, vision = command_options(plan)
                    for program, options in (("trtllm-build", decoder),
                                             ("multimodal_builder", vision or {})):  # fmt: skip
                        for name, value in options.items():
                            kind = OPTIONS[program][name]
                            assert is_valid(value, kind), (program, name, value)
                            seen.add(name)
    assert {"gemm_plugin", "gather_context_logits", "workers"} <= seen


def test_all_options_of_a_llava(tmp_path):
    plan = plan_for("llava", tmp_path, "fp8", tensor=2, engine={"max_batch_size": 4})
    home = tmp_path / "fp8"
    assert command_options(plan) == (
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
def test_plugins_depend_on_the_format(tmp_path, fmt, batch, gemm, fused):
    plan = plan_for("llava", tmp_path, fmt, engine={"max_batch_size": batch})
    decoder, _ = command_options(plan)
    assert (decoder.get("gemm_plugin"), decoder["use_fused_mlp"]) == (gemm, fused)
    phi, _ = command_options(plan_for("phi", tmp_path, fmt, engine={"max_batch_size": batch}))
    assert (phi.get("gemm_plugin"), phi["use_fused_mlp"]) == (gemm, "disable")


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_paged_context_fmha_depends_on_number_formats(tmp_path, fmt):
    for kv_cache in ("none", "fp8", "int8"):
        if "trtllm" in supported_targets(FORMATS[fmt], kv_cache):
            decoder, _ = command_options(plan_for("llava", tmp_path, fmt, kv_cache=kv_cache))
            paged = fmt in ("fp8", "w4a8_awq", "nvfp4") and kv_cache != "int8"
            assert decoder["use_paged_context_fmha"] == ("enable" if paged else "disable")


@pytest.mark.parametrize(("family", "tokens"), [("llava", 64), ("vila", 25), ("phi", 1024)])
def test_max_multimodal_len_depends_on_the_family(tmp_path, family, tokens):
    lengths = {"max_batch_size": 3, "max_input_len": 1024, "max_seq_len": 1100}
    decoder, vision = command_options(plan_for(family, tmp_path, engine=lengths))
    assert decoder["max_multimodal_len"] == str(3 * tokens)
    assert decoder["max_num_tokens"] == str(3 * 1024)
    assert (vision is None) == (family == "phi")
    assert family != "vila" or vision["vila_path"] == str(ROOT)


def test_llava_next_allows_any_number_of_tiles(tmp_path):
    plan = replace(plan_for("llava", tmp_path), family=FAMILIES["llava_next"])
    decoder, vision = command_options(plan)
    assert decoder["max_multimodal_len"] == str(8 * 4096) and vision["model_type"] == "llava_next"


def test_phi_has_no_vision_engine(tmp_path):
    lines = build_script(plan_for("phi", tmp_path, "int4_awq")).splitlines()
    assert lines[0] == "# int4_awq: llm" and shlex.split(lines[1])[0] == "trtllm-build"
    assert lines[2:] == [
        "# int4_awq: no vision engine: TensorRT-LLM runs the vision tower of phi with torch"
    ]


def test_dry_run_prints_commands_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    recipe = engine_recipe(tmp_path, quantize={"format": ["fp8", "int8_sq"]})
    code, out, err = call(capsys, "build", recipe, "--dry-run", "engine.max_batch_size=2")
    assert (code, err) == (0, "")
    assert out == build_script(load_plan(recipe, "engine.max_batch_size=2"))
    assert out.count("trtllm-build") == 2 and out.count("--model_type llava") == 2
    assert not (tmp_path / "work").exists()
    assert error_message("run", recipe, "--dry-run").startswith("--dry-run is an option of build")


def load_plan(recipe, *overrides):
    """Return the plan of a recipe file."""
    return make_plan(load_recipe(str(recipe), overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export.targets=[hf]"],
         "format fp8 has no TensorRT-LLM checkpoint to build an engine from; remove it from "
         "quantize.format, or add trtllm to export.targets if `formats` lists it"),
        (["engine.max_input_len=63"],
         "engine.max_input_len must be at least 64, the tokens of an image; got 63"),
        (["engine.max_seq_len=4096"],
         "engine.max_seq_len must be greater than engine.max_input_len=4096, to leave tokens for "
         "the answer; got 4096"),
        (["model=assets/tiny-vila"],
         "engine.vila_path is missing: the vision engine of family vila is built with VILA's "
         "code; set it to the folder of a clone at commit ec7fb2c2"),
    ],
)  # fmt: skip
def test_engines_that_cannot_be_built_are_rejected(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(ROOT)
    recipe = engine_recipe(tmp_path)
    stages = "stages=[import, build]"
    for command in (["build"], ["build", "--dry-run"], ["run", stages], ["plan", stages]):
        assert error_message(command[0], recipe, *command[1:], *overrides) == message
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["build"],
        ["run", "stages=[import, observe, solve, export, build]"],
        ["evaluate", "from=engine"],
        ["run", "evaluate.from=engine"],
        ["logits", "from=engine", "inputs=x", "output=y"],
    ],
)
def test_missing_trtllm_is_reported_before_any_work(tmp_path, monkeypatch, command):
    monkeypatch.setenv("PATH", "/nowhere")
    message = error_message(command[0], engine_recipe(tmp_path), *command[1:])
    assert message == NOT_ON_PATH + SUPPORTED + DRY_RUN_HINT
    assert not (tmp_path / "work").exists()


def test_plan_does_not_require_trtllm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    recipe = engine_recipe(tmp_path)
    assert "build" not in load_recipe(str(recipe)).stages
    assert call(capsys, "plan", recipe, "stages=[import, build]")[0] == 0


@pytest.mark.parametrize("version", ["1.3.0rc1", "1.2.2", "0.17.0", "2.0.0", "nonsense"])
def test_unsupported_version_is_rejected(tmp_path, monkeypatch, version):
    install(tmp_path / "trt", monkeypatch, version)
    message = error_message("build", engine_recipe(tmp_path))
    path = tmp_path / "trt" / "bin" / "trtllm-build"
    expected = f"unsupported TensorRT-LLM version {version} of {path}; {SUPPORTED}{DRY_RUN_HINT}"
    assert message == expected


@pytest.mark.parametrize("version", ["1.2.1", "1.2.0rc2", "1.0.0", "0.18.0"])
def test_supported_version_is_found(tmp_path, monkeypatch, version):
    install(tmp_path / "trt", monkeypatch, version)
    installation = find_installation(plan_for("llava", tmp_path))
    assert installation.version == version
    assert installation.path == str(tmp_path / "trt/bin/trtllm-build")


def test_vila_path_must_exist_when_engines_are_built(tmp_path, monkeypatch):
    install(tmp_path / "trt", monkeypatch)
    plan = plan_for("vila", tmp_path, engine={"vila_path": "/nowhere/VILA"})
    assert "--vila_path /nowhere/VILA" in build_script(plan)  # the path may exist in a container
    with pytest.raises(UserError, match=r"^engine.vila_path=/nowhere/VILA does not exist"):
        find_installation(plan)


def test_format_unsupported_by_the_gpu_is_rejected(tmp_path, monkeypatch):
    install(tmp_path / "trt", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    find_installation(plan_for("llava", tmp_path, "w4a8_awq"))
    with pytest.raises(UserError) as caught:
        find_installation(plan_for("llava", tmp_path, "nvfp4"))
    assert str(caught.value) == (
        "format nvfp4 requires compute capability 10.0, but NVIDIA H100 has 9.0; supported "
        "formats: fp8, int8_sq, int4_awq, w4a8_awq"
    )
