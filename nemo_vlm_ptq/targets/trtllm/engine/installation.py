"""Find TensorRT-LLM on this machine and check its version and GPU.

TensorRT-LLM pins other versions of transformers and ModelOpt than this package. It therefore lives
in its own environment, and is used through its command and its interpreter only.
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
from nemo_vlm_ptq.targets.trtllm.spec import SPEC

OLDEST, NEWEST = "0.18", "1.2.1"  # later versions have no engine backend
SUPPORTED_VERSIONS = f"supported: versions {OLDEST} to {NEWEST}, later ones build no engines"
DRY_RUN_HINT = "`nemo-vlm-ptq build RECIPE --dry-run` prints the commands"
# quant_algo -> minimum compute capability whose tensor cores support it: Ada; Blackwell.
CAPABILITY = {"FP8": (8, 9), "W4A8_AWQ": (8, 9), "NVFP4": (10, 0)}
# Variables with which launchers identify ranks; TensorRT-LLM would join their job.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
LAUNCHERS = (*TORCHRUN, "OMPI_", "PMIX_", "PMI_", "SLURM_")


@dataclass(frozen=True)
class Installation:
    """TensorRT-LLM on this machine.

    path: of trtllm-build.
    python: command line of its interpreter.
    version: of the package tensorrt_llm.
    """

    path: str
    python: tuple[str, ...]
    version: str


def find_installation(plan: Plan) -> Installation:
    """Find TensorRT-LLM by trtllm-build on PATH.

    Raises:
        UserError: it is missing or of an unsupported version, VILA's code does not exist, or the
            GPU does not support a format.
    """
    path = shutil.which("trtllm-build")
    if path is None:
        raise UserError(
            "engines require TensorRT-LLM, but trtllm-build is not on PATH; "
            f"{SUPPORTED_VERSIONS}; {DRY_RUN_HINT}"
        )
    python = _interpreter(Path(path))
    version = _read_version(python)
    if not _parse_version(OLDEST) <= _parse_version(version) <= _parse_version(NEWEST):
        raise UserError(
            f"unsupported TensorRT-LLM version {version} of {path}; {SUPPORTED_VERSIONS}; "
            f"{DRY_RUN_HINT}"
        )
    vila_path = plan.recipe.engine.vila_path
    if plan.family.trtllm_vision_type == "vila" and not Path(vila_path or "").is_dir():
        raise UserError(
            f"engine.vila_path={vila_path} does not exist; clone VILA there, {DRY_RUN_HINT}"
        )
    _check_gpu(plan.formats)
    return Installation(path=path, python=python, version=version)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables that make it a rank."""
    return {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}


def gpu_name() -> str | None:
    """Return the name of the GPU; engines run only on the model that they were built on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _interpreter(path: Path) -> tuple[str, ...]:
    """Return the interpreter of a script that pip installed: from its shebang, else its folder."""
    with path.open("rb") as file:
        shebang = file.readline().decode(errors="replace")
    if shebang.startswith("#!") and "python" in shebang:
        return tuple(shebang[2:].split())
    return (str(path.with_name("python3")),)


def _read_version(python: tuple[str, ...]) -> str:
    code = "from importlib.metadata import version; print(version('tensorrt_llm'))"
    try:
        result = subprocess.run(
            [*python, "-c", code], env=clean_environment(), capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def _parse_version(version: str) -> tuple[int, ...]:
    """Return (1, 2, 1) for 1.2.1, 1.2.1rc3 and 1.2.1.post1; () if it is not a version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in match.groups()) if match else ()


def _check_gpu(formats: Iterable[QuantFormat]) -> None:
    """Reject formats that the GPU does not support; without a GPU, trtllm-build fails itself."""
    import torch

    if not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    required = {
        fmt.name: CAPABILITY.get(fmt.quant_algo, (0, 0))
        for fmt in FORMATS.values()
        if fmt.name in SPEC.formats
    }
    for fmt in formats:
        minimum = required[fmt.name]
        if capability < minimum:
            supported = ", ".join(name for name, least in required.items() if capability >= least)
            raise UserError(
                f"format {fmt.name} requires compute capability {minimum[0]}.{minimum[1]}, but "
                f"{gpu_name()} has {capability[0]}.{capability[1]}; supported formats: {supported}"
            )
