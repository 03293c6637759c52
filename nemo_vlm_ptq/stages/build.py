"""build: build engines from a TensorRT-LLM checkpoint with TensorRT-LLM's own programs.

Rank 0 runs them one after the other; trtllm-build distributes the ranks of an engine over GPUs.
"""

from __future__ import annotations

import shlex
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero, run_stage
from nemo_vlm_ptq.distributed.launcher import die_with_parent
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.targets.trtllm.engine.commands import Command, engine_commands, engine_files
from nemo_vlm_ptq.targets.trtllm.engine.installation import (
    Installation,
    clean_environment,
    find_installation,
    gpu_name,
)
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import check_folder

POLL_SECONDS = 30.0  # between two polls of a program; other ranks wait in a collective meanwhile
LOG_TAIL_LINES = 3  # lines of a log quoted in an error message


def build(context: RunContext) -> None:
    """Build the engines of every format into FORMAT/engine/llm and /vision."""
    installation = on_rank_zero(context.parallel, lambda: find_installation(context.plan))
    gpu = on_rank_zero(context.parallel, gpu_name)
    for fmt in context.plan.formats:
        checkpoint = context.folder(fmt.name, "trtllm")
        store.require_manifest(checkpoint, "export")
        settings: dict[str, Any] = {
            "format": fmt.name,
            "input": store.hash_manifest(checkpoint),
            "tensorrt_llm": installation.version,
            "gpu": gpu,
            **context.plan.recipe.engine.model_dump(
                exclude={"kv_cache_free_gpu_memory_fraction", "vila_path"}
            ),
        }
        folder = context.folder(fmt.name, "engine")
        body = partial(_build, context, fmt, folder, installation)
        run_stage(context, f"build {fmt.name}", folder, settings, body)


def _build(
    context: RunContext, fmt: QuantFormat, folder: Path, installation: Installation
) -> StageOutput:
    checkpoint = context.folder(fmt.name, "trtllm")
    on_rank_zero(context.parallel, partial(check_folder, checkpoint, "export"))
    commands = engine_commands(context.plan, fmt, installation.path, installation.python)
    for command in commands:
        _run(context, f"build {fmt.name}", command, folder / f"{command.name}.log")
    if context.parallel.rank != 0:
        return StageOutput()
    if not (folder / "vision").exists():  # families whose tower TensorRT-LLM runs in torch
        (folder / "vision").mkdir()
        model_type = context.plan.family.trtllm_vision_type
        config = {"builder_config": {"precision": "float16", "model_type": model_type}}
        store.write_json(folder / "vision" / "config.json", config)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    lines = {command.name: shlex.join(command.args) for command in commands}
    return StageOutput(files, {"commands": lines})


def _run(context: RunContext, label: str, command: Command, log: Path) -> None:
    """Run a command on rank 0; the log holds its command line and output.

    Raises:
        UserError: on every rank, if it failed or wrote no engine.
    """
    parallel, process = context.parallel, None
    if parallel.rank == 0:
        parallel.log(f"{label}: building {command.name}, log in {log}")
        with log.open("w") as file:
            file.write(shlex.join(command.args) + "\n")
            file.flush()
            process = subprocess.Popen(
                command.args,
                env=clean_environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
    try:
        while (code := parallel.all_gather(_poll(process))[0]) is None:
            pass
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
    on_rank_zero(parallel, lambda: _check_result(context, command, code, log))


def _poll(process: subprocess.Popen[bytes] | None) -> int | None:
    """Return the exit code of a process, None while it runs."""
    try:
        return None if process is None else process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _check_result(context: RunContext, command: Command, code: int, log: Path) -> None:
    files = [name for name in engine_files(context.plan) if name.startswith(f"{command.name}/")]
    missing = [name for name in files if not (log.parent / name).is_file()]
    if code == 0 and not missing:
        return
    lines = log.read_text(errors="replace").split("\n", 1)[1].splitlines()
    tail = " | ".join([line.strip() for line in lines if line.strip()][-LOG_TAIL_LINES:])
    ended = f"ended with exit code {code}" if code else f"did not write {log.parent / missing[0]}"
    program = Path(command.args[0]).name
    raise UserError(f"{program} {ended}; last output, in {log}: {tail or 'none'}")
