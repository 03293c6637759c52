"""What TensorRT-LLM 1.2 is told to build: the decoder by trtllm-build, the tower by its builder.

Ranks and number formats are read by trtllm-build from the checkpoint's config.json; everything
that it could guess wrong is said. docs/engines.md has the table.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.planning.plan import Plan

TIMING_CACHE = "timing.cache"  # in the work folder: engines of all formats share it
MAX_NUM_TOKENS = 16384  # of all requests of a step
SMALL_BATCH = 4  # up to which the FP8 GEMM plugin beats TensorRT's own kernels
GEMM_PLUGIN = {"W4A16_AWQ": "auto", "W4A8_AWQ": "auto", "NVFP4": "nvfp4"}  # others: none
PAGED_CONTEXT = ("FP8", "W4A8_AWQ", "NVFP4")  # formats whose prompts may attend to a paged cache
NO_VISION_ENGINE = ("phi-3-vision",)  # its tower is run by torch, images come in many shapes
# The wheel has the builder of vision engines, and no command for it.
VISION_BUILDER = (
    "import argparse; from tensorrt_llm.tools import multimodal_builder as m; "
    "m.MultimodalEngineBuilder("
    "m.add_multimodal_arguments(argparse.ArgumentParser()).parse_args()).build()"
)


@dataclass(frozen=True)
class Command:
    """A command line; `name` is that of the folder it fills, and of its log."""

    name: str
    words: tuple[str, ...]


def check_engine(plan: Plan) -> None:
    """What the recipe asks of engines can be built from its checkpoints.

    Raises:
        UserError: a format without a TensorRT-LLM checkpoint, lengths that hold no image or no
            answer, or VILA's code is not named.
    """
    wanted = plan.recipe.engine
    for fmt in plan.formats:
        if "trtllm" not in plan.targets(fmt):
            raise UserError(
                f"format {fmt.name} gets no TensorRT-LLM checkpoint to build an engine from; leave "
                "it out of quantize.format, or add trtllm to export.targets where `formats` has it"
            )
    tokens = (
        1 if plan.family.tokens_per_image is None else plan.family.tokens_per_image(plan.config)
    )
    if wanted.max_input_len < tokens:
        raise UserError(
            f"engine.max_input_len={wanted.max_input_len} does not hold an image of {tokens} tokens"
        )
    if wanted.max_seq_len <= wanted.max_input_len:
        raise UserError(
            f"engine.max_seq_len={wanted.max_seq_len} leaves no token for an answer; it must be "
            f"more than engine.max_input_len={wanted.max_input_len}"
        )
    if plan.family.trtllm_vision_type == "vila" and wanted.vila_path is None:
        raise UserError(
            "family vila: its vision engine is built with VILA's own code; set "
            "engine.vila_path=FOLDER to a clone of it at commit ec7fb2c2"
        )


def engine_commands(
    plan: Plan,
    fmt: QuantFormat,
    builder: str = "trtllm-build",
    python: Sequence[str] = ("python3",),
) -> list[Command]:
    """The commands that fill FORMAT/engine/, in order.

    Args:
        plan: of the whole job.
        fmt: one of its formats.
        builder: the trtllm-build to call.
        python: the interpreter that has tensorrt_llm.
    """
    commands = [Command("llm", (builder, *_words(_decoder_options(plan, fmt))))]
    if plan.family.trtllm_vision_type not in NO_VISION_ENGINE:
        options = _words(_vision_options(plan, fmt))
        commands.append(Command("vision", (*python, "-c", VISION_BUILDER, *options)))
    return commands


def build_script(plan: Plan) -> str:
    """The commands of all formats as lines for a shell."""
    lines = []
    for fmt in plan.formats:
        for command in engine_commands(plan, fmt):
            lines += [f"# {fmt.name}: {command.name}", shlex.join(command.words)]
        if plan.family.trtllm_vision_type in NO_VISION_ENGINE:
            lines.append(
                f"# {fmt.name}: no vision engine: TensorRT-LLM runs {plan.family.name}'s tower "
                "with torch"
            )
    return "\n".join(lines) + "\n"


def engine_files(plan: Plan) -> list[str]:
    """Names in FORMAT/engine/ that whole engines have at least."""
    ranks = plan.recipe.export.tensor * plan.recipe.export.pipeline
    names = ["llm/config.json", *(f"llm/rank{rank}.engine" for rank in range(ranks))]
    vision = plan.family.trtllm_vision_type not in NO_VISION_ENGINE
    return [*names, "vision/config.json", *(["vision/model.engine"] if vision else [])]


def _decoder_options(plan: Plan, fmt: QuantFormat) -> dict[str, str | int | None]:
    """Options of trtllm-build; None is a flag."""
    recipe, wanted = plan.recipe, plan.recipe.engine
    home = Path(recipe.workdir)
    T, P = recipe.export.tensor, recipe.export.pipeline
    llama = plan.family.trtllm_architecture == "LlamaForCausalLM"
    paged = fmt.quant_algo in PAGED_CONTEXT and recipe.quantize.kv_cache != "int8"
    options: dict[str, str | int | None] = {
        "checkpoint_dir": str(home / fmt.name / "trtllm" / "llm"),
        "output_dir": str(home / fmt.name / "engine" / "llm"),
        "input_timing_cache": str(home / TIMING_CACHE),
        "output_timing_cache": str(home / TIMING_CACHE),
        "workers": T * P,
        "max_batch_size": wanted.max_batch_size,
        "max_input_len": wanted.max_input_len,
        "max_seq_len": wanted.max_seq_len,
        "max_num_tokens": min(wanted.max_batch_size * wanted.max_input_len, MAX_NUM_TOKENS),
        "max_multimodal_len": wanted.max_batch_size * _image_room(plan),
        "kv_cache_type": "paged",
        "use_paged_context_fmha": _switch(paged),
        "use_fused_mlp": _switch(llama and fmt.quant_algo == "FP8"),
        "reduce_fusion": _switch(llama and T > 1 and P == 1),
    }
    gemm = GEMM_PLUGIN.get(fmt.quant_algo)
    if fmt.quant_algo == "FP8" and wanted.max_batch_size <= SMALL_BATCH:
        gemm = "fp8"
    if gemm is not None:
        options["gemm_plugin"] = gemm
    if wanted.context_logits:
        options["gather_context_logits"] = None
    return options


def _vision_options(plan: Plan, fmt: QuantFormat) -> dict[str, str | int | None]:
    """Options of the multimodal builder, which reads tower and projector from the source."""
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


def _image_room(plan: Plan) -> int:
    """Image tokens of a request: an image's, or a whole prompt's where images differ."""
    if plan.family.tokens_per_image is None:
        return plan.recipe.engine.max_input_len
    return plan.family.tokens_per_image(plan.config)


def _switch(on: bool) -> str:
    return "enable" if on else "disable"


def _words(options: dict[str, str | int | None]) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    return words
