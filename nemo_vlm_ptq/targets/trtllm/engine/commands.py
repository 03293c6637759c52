"""Compose the commands that build TensorRT-LLM 1.2 engines of decoder and vision tower.

trtllm-build takes ranks and number formats from the checkpoint's config.json. Every option whose
default could be wrong is passed explicitly; docs/legacy/engines.md lists them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.planning.plan import Plan

TIMING_CACHE = "timing.cache"  # in the work folder, shared by the engines of all formats
MAX_NUM_TOKENS = 16384  # of all requests of a step
FP8_PLUGIN_MAX_BATCH = 4  # largest batch for which the FP8 GEMM plugin beats TensorRT's kernels
GEMM_PLUGINS = {"W4A16_AWQ": "auto", "W4A8_AWQ": "auto", "NVFP4": "nvfp4"}  # others: none
PAGED_CONTEXT_FMHA = ("FP8", "W4A8_AWQ", "NVFP4")  # quant_algo that supports it
# Model types whose vision tower torch runs, because the input shape varies.
TORCH_VISION_TYPES = ("phi-3-vision",)
# The wheel has the builder of vision engines, but no command for it.
VISION_BUILDER = (
    "import argparse; from tensorrt_llm.tools import multimodal_builder as m; "
    "m.MultimodalEngineBuilder("
    "m.add_multimodal_arguments(argparse.ArgumentParser()).parse_args()).build()"
)


@dataclass(frozen=True)
class Command:
    """A command line; `name` is that of its output folder and of its log."""

    name: str
    args: tuple[str, ...]


def check_engine(plan: Plan) -> None:
    """Check that the engines of a recipe can be built from its checkpoints.

    Raises:
        UserError: a format has no TensorRT-LLM checkpoint, the lengths are too small for an image
            or an answer, or the path of VILA's code is missing.
    """
    engine = plan.recipe.engine
    for fmt in plan.formats:
        if "trtllm" not in plan.targets(fmt):
            raise UserError(
                f"format {fmt.name} has no TensorRT-LLM checkpoint to build an engine from; remove "
                "it from quantize.format, or add trtllm to export.targets if `formats` lists it"
            )
    tokens = (
        1 if plan.family.tokens_per_image is None else plan.family.tokens_per_image(plan.config)
    )
    if engine.max_input_len < tokens:
        raise UserError(
            f"engine.max_input_len must be at least {tokens}, the tokens of an image; "
            f"got {engine.max_input_len}"
        )
    if engine.max_seq_len <= engine.max_input_len:
        raise UserError(
            f"engine.max_seq_len must be greater than engine.max_input_len={engine.max_input_len}, "
            f"to leave tokens for the answer; got {engine.max_seq_len}"
        )
    if plan.family.trtllm_vision_type == "vila" and engine.vila_path is None:
        raise UserError(
            "engine.vila_path is missing: the vision engine of family vila is built with VILA's "
            "code; set it to the folder of a clone at commit ec7fb2c2"
        )


def engine_commands(
    plan: Plan,
    fmt: QuantFormat,
    builder: str = "trtllm-build",
    python: Sequence[str] = ("python3",),
) -> list[Command]:
    """Return the commands that fill FORMAT/engine/, in order.

    Args:
        plan: the plan of the run.
        fmt: one of its formats.
        builder: path of trtllm-build.
        python: command line of the interpreter that has tensorrt_llm.
    """
    commands = [Command("llm", (builder, *_to_args(_decoder_options(plan, fmt))))]
    if plan.family.trtllm_vision_type not in TORCH_VISION_TYPES:
        options = _to_args(_vision_options(plan, fmt))
        commands.append(Command("vision", (*python, "-c", VISION_BUILDER, *options)))
    return commands


def build_script(plan: Plan) -> str:
    """Return the commands of all formats as a shell script."""
    lines = []
    for fmt in plan.formats:
        for command in engine_commands(plan, fmt):
            lines += [f"# {fmt.name}: {command.name}", shlex.join(command.args)]
        if plan.family.trtllm_vision_type in TORCH_VISION_TYPES:
            lines.append(
                f"# {fmt.name}: no vision engine: TensorRT-LLM runs the vision tower of "
                f"{plan.family.name} with torch"
            )
    return "\n".join(lines) + "\n"


def engine_files(plan: Plan) -> list[str]:
    """Return the names of the files that complete engines have at least, in FORMAT/engine/."""
    ranks = plan.recipe.export.tensor * plan.recipe.export.pipeline
    names = ["llm/config.json", *(f"llm/rank{rank}.engine" for rank in range(ranks))]
    vision = plan.family.trtllm_vision_type not in TORCH_VISION_TYPES
    return [*names, "vision/config.json", *(["vision/model.engine"] if vision else [])]


def _decoder_options(plan: Plan, fmt: QuantFormat) -> dict[str, str | int | None]:
    """Return the options of trtllm-build; an option with value None is a flag."""
    recipe, engine = plan.recipe, plan.recipe.engine
    workdir = Path(recipe.workdir)
    T, P = recipe.export.tensor, recipe.export.pipeline
    is_llama = plan.family.trtllm_architecture == "LlamaForCausalLM"
    paged = fmt.quant_algo in PAGED_CONTEXT_FMHA and recipe.quantize.kv_cache != "int8"
    options: dict[str, str | int | None] = {
        "checkpoint_dir": str(workdir / fmt.name / "trtllm" / "llm"),
        "output_dir": str(workdir / fmt.name / "engine" / "llm"),
        "input_timing_cache": str(workdir / TIMING_CACHE),
        "output_timing_cache": str(workdir / TIMING_CACHE),
        "workers": T * P,
        "max_batch_size": engine.max_batch_size,
        "max_input_len": engine.max_input_len,
        "max_seq_len": engine.max_seq_len,
        "max_num_tokens": min(engine.max_batch_size * engine.max_input_len, MAX_NUM_TOKENS),
        "max_multimodal_len": engine.max_batch_size * _max_image_tokens(plan),
        "kv_cache_type": "paged",
        "use_paged_context_fmha": _switch(paged),
        "use_fused_mlp": _switch(is_llama and fmt.quant_algo == "FP8"),
        "reduce_fusion": _switch(is_llama and T > 1 and P == 1),
    }
    gemm_plugin = GEMM_PLUGINS.get(fmt.quant_algo)
    if fmt.quant_algo == "FP8" and engine.max_batch_size <= FP8_PLUGIN_MAX_BATCH:
        gemm_plugin = "fp8"
    if gemm_plugin is not None:
        options["gemm_plugin"] = gemm_plugin
    if engine.context_logits:
        options["gather_context_logits"] = None
    return options


def _vision_options(plan: Plan, fmt: QuantFormat) -> dict[str, str | int | None]:
    """Return the options of the multimodal builder, which reads the source model."""
    recipe = plan.recipe
    options: dict[str, str | int | None] = {
        "model_type": plan.family.trtllm_vision_type,
        "model_path": str(plan.folder),
        "output_dir": str(Path(recipe.workdir) / fmt.name / "engine" / "vision"),
        "max_batch_size": recipe.engine.max_batch_size,
    }
    if plan.family.trtllm_vision_type == "vila":
        options["vila_path"] = recipe.engine.vila_path
    return options


def _max_image_tokens(plan: Plan) -> int:
    """Return the image tokens of a request; the maximum prompt length if they vary by image."""
    if plan.family.tokens_per_image is None:
        return plan.recipe.engine.max_input_len
    return plan.family.tokens_per_image(plan.config)


def _switch(enabled: bool) -> str:
    return "enable" if enabled else "disable"


def _to_args(options: dict[str, str | int | None]) -> list[str]:
    args = []
    for name, value in options.items():
        args += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    return args
