"""Is TensorRT-LLM here, in a version that builds engines, on a GPU that runs the format?

It pins other versions of transformers and ModelOpt than this package, so it lives in an environment
of its own; what is asked of it is asked through its command and its interpreter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS, QuantFormat
from nemo_vlm_ptq.planning.plan import Plan

OLDEST, NEWEST = "0.18", "1.2.1"  # later ones have no engines
WORKS = f"versions {OLDEST} to {NEWEST} work, later ones have no engines"
DRY = "`nemo-vlm-ptq build RECIPE --dry-run` prints the commands"
# Compute capability from which a GPU has the numbers of a format: Ada, Hopper; Blackwell.
CAPABILITY = {"FP8": (8, 9), "W4A8_AWQ": (8, 9), "NVFP4": (10, 0)}
# What launchers tell their ranks: TensorRT-LLM would take itself for one of them.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
LAUNCHERS = (*TORCHRUN, "OMPI_", "PMIX_", "PMI_", "SLURM_")


@dataclass(frozen=True)
class Builder:
    """TensorRT-LLM on this machine: its command, its interpreter, its version."""

    path: str
    python: tuple[str, ...]
    version: str


def find_builder(plan: Plan) -> Builder:
    """TensorRT-LLM by its trtllm-build on PATH.

    Raises:
        UserError: there is none, its version builds no engines, or VILA's code or a GPU for a
            format is missing.
    """
    path = shutil.which("trtllm-build")
    if path is None:
        raise UserError(
            f"engines need TensorRT-LLM, whose trtllm-build is not on PATH; {WORKS}; {DRY}"
        )
    python = _interpreter(Path(path))
    version = _ask_version(python)
    if not _numbers(OLDEST) <= _numbers(version) <= _numbers(NEWEST):
        raise UserError(f"{path} is of TensorRT-LLM {version}; {WORKS}; {DRY}")
    code = plan.recipe.engine.vila_path
    if plan.family.trtllm_vision_type == "vila" and not Path(code or "").is_dir():
        raise UserError(f"engine.vila_path={code} is no folder; clone VILA there, {DRY}")
    _check_gpu(plan.formats)
    return Builder(path, python, version)


def clean_environment() -> dict[str, str]:
    """This process's environment without what makes it a rank."""
    return {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}


def gpu_name() -> str | None:
    """The GPU that engines are built for, as they run on no other kind."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _interpreter(path: Path) -> tuple[str, ...]:
    """The python of a script that pip installed: its first line, else the one beside it."""
    with path.open("rb") as file:
        first = file.readline().decode(errors="replace")
    if first.startswith("#!") and "python" in first:
        return tuple(first[2:].split())
    return (str(path.with_name("python3")),)


def _ask_version(python: tuple[str, ...]) -> str:
    code = "from importlib.metadata import version; print(version('tensorrt_llm'))"
    try:
        done = subprocess.run(
            [*python, "-c", code], env=clean_environment(), capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 2, 1) of 1.2.1, 1.2.1rc3 or 1.2.1.post1; () of what is no version."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def _check_gpu(formats: Iterable[QuantFormat]) -> None:
    """A machine without GPUs is left to trtllm-build to refuse."""
    import torch

    if not torch.cuda.is_available():
        return
    have = torch.cuda.get_device_capability()
    needs = {
        row.name: CAPABILITY.get(row.quant_algo, (0, 0))
        for row in FORMATS.values()
        if "trtllm" in row.targets
    }
    for fmt in formats:
        need = needs[fmt.name]
        if have < need:
            works = ", ".join(name for name, least in needs.items() if have >= least)
            raise UserError(
                f"format {fmt.name} needs a GPU of compute capability {need[0]}.{need[1]} or more, "
                f"and {gpu_name()} has {have[0]}.{have[1]}; these formats work: {works}"
            )
