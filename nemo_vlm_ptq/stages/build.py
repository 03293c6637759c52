"""build: a TensorRT-LLM checkpoint becomes engines, by TensorRT-LLM's own programs.

Rank 0 runs them, one after the other; trtllm-build spreads the ranks of an engine over GPUs itself.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero, run_stage
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.targets.trtllm.engine.commands import Command, engine_commands, engine_files
from nemo_vlm_ptq.targets.trtllm.engine.installation import (
    Builder,
    clean_environment,
    find_builder,
    gpu_name,
)
from nemo_vlm_ptq.workdir import store

PATIENCE = 30.0  # seconds between two looks at a builder; ranks may wait for each other for minutes
TAIL = 3  # lines of a log that a failure is told with


def build(job: RunContext) -> None:
    """Engines of every format, in FORMAT/engine/llm and /vision."""
    builder = on_rank_zero(job.parallel, lambda: find_builder(job.plan))
    gpu = on_rank_zero(job.parallel, gpu_name)
    for fmt in job.plan.formats:
        source = job.folder(fmt.name, "trtllm")
        store.require_manifest(source, "export")
        chosen = job.plan.recipe.engine.model_dump(
            exclude={"kv_cache_free_gpu_memory_fraction", "vila_path"}
        )
        settings: dict[str, Any] = {
            "format": fmt.name,
            "input": store.hash_manifest(source),
            "tensorrt_llm": builder.version,
            "gpu": gpu,
            **chosen,
        }
        folder = job.folder(fmt.name, "engine")
        run_stage(
            job,
            f"build {fmt.name}",
            folder,
            settings,
            lambda fmt=fmt, folder=folder: _build(job, fmt, folder, builder),  # type: ignore[misc]
        )


def _build(job: RunContext, fmt: QuantFormat, folder: Path, builder: Builder) -> StageOutput:
    commands = engine_commands(job.plan, fmt, builder.path, builder.python)
    for command in commands:
        _run(job, f"build {fmt.name}", command, folder / f"{command.name}.log")
    if job.parallel.rank != 0:
        return StageOutput()
    if not (folder / "vision").exists():  # what TensorRT-LLM's builder leaves of such a family
        (folder / "vision").mkdir()
        kind = {"precision": "float16", "model_type": job.plan.family.trtllm_vision_type}
        store.write_json(folder / "vision" / "config.json", {"builder_config": kind})
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    said = {command.name: shlex.join(command.words) for command in commands}
    return StageOutput(files, {"commands": said})


def _run(job: RunContext, label: str, command: Command, log: Path) -> None:
    """Run a command on rank 0, its words and whatever it prints in a log.

    Raises:
        UserError: on every rank, it failed or left no engine.
    """
    parallel, process = job.parallel, None
    if parallel.rank == 0:
        parallel.log(f"{label}: {command.name} is being built, see {log}")
        with log.open("w") as file:
            file.write(shlex.join(command.words) + "\n")
            file.flush()
            process = subprocess.Popen(
                command.words, env=clean_environment(), stdout=file, stderr=subprocess.STDOUT
            )
    try:
        while (code := parallel.gather(_look(process))[0]) is None:
            pass
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
    on_rank_zero(parallel, lambda: _check(job, command, code, log))


def _look(process: subprocess.Popen[bytes] | None) -> int | None:
    """The exit code of a command, None while it runs."""
    try:
        return None if process is None else process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return None


def _check(job: RunContext, command: Command, code: int, log: Path) -> None:
    expected = [name for name in engine_files(job.plan) if name.startswith(f"{command.name}/")]
    missing = [name for name in expected if not (log.parent / name).is_file()]
    if code == 0 and not missing:
        return
    lines = log.read_text(errors="replace").split("\n", 1)[1].splitlines()
    tail = " | ".join([line.strip() for line in lines if line.strip()][-TAIL:]) or "nothing"
    ended = f"ended with exit code {code}" if code else f"left no {log.parent / missing[0]}"
    program = Path(command.words[0]).name
    raise UserError(f"{program} {ended}; the last it said, in {log}: {tail}")
