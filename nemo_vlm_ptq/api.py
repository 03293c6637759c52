"""Quantize a model with one call from Python, in a notebook, a script, or under torchrun."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.errors import UserError, VerificationError

if TYPE_CHECKING:
    from nemo_vlm_ptq.recipe import Recipe

ERROR_PREFIX = "nemo-vlm-ptq: error: "


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What a run wrote.

    workdir: the work folder.
    exports: format -> target -> checkpoint folder.
    errors: one entry per format, layer and linear: relative output error over all calibration
        tokens (`error`), over text tokens (`error_text`) and image tokens (`error_image`); None
        where no second moments were observed.
    verify: format -> result of the verification; empty if it did not run.
    scores: format, or "16bit" for the source -> scores; empty if evaluate did not run.
    report: the HTML report, or None.
    """

    workdir: Path
    exports: dict[str, dict[str, Path]]
    errors: list[dict[str, Any]]
    verify: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    report: Path | None


def quantize(
    model: str | Path,
    workdir: str | Path,
    *,
    format: str | list[str] = "fp8",
    data: str | Path | None = None,
    **sections: Any,
) -> QuantizeResult:
    """Quantize a model and return what was written; finished stages are skipped.

    Outside of ranks the run has processes of its own, whose log goes to sys.stderr. On ranks that
    torchrun or mpirun started, every rank calls this function.

    Args:
        model: model folder or hub id.
        workdir: work folder.
        format: `quantize.format`, a name or a list.
        data: `calibration.data`, a folder of questions and images.
        sections: further recipe keys, such as quantize={"group_size": 64}, export={"targets":
            ["hf"]}, parallel={"tensor": 2}, stages=["import", "observe", "solve", "export"].

    Raises:
        UserError: something the user can fix.
        VerificationError: verification failed or a quality gate was missed.
    """
    from nemo_vlm_ptq.distributed.launcher import inside_ranks
    from nemo_vlm_ptq.recipe import make_recipe

    tree = {"model": str(model), "workdir": str(workdir), **sections}
    tree["quantize"] = {"format": format} | _section(sections, "quantize")
    tree["calibration"] = {} if data is None else {"data": str(data)}
    tree["calibration"] |= _section(sections, "calibration")
    recipe = make_recipe(tree)
    with tempfile.TemporaryDirectory(prefix="nemo-vlm-ptq-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(json.dumps(tree, default=str))  # JSON is YAML
        if inside_ranks():
            from nemo_vlm_ptq.commands import run_command

            run_command("run", str(file), [])
        else:
            _run_process(file)
    return read_result(recipe)


def read_result(recipe: Recipe) -> QuantizeResult:
    """Return what lies in a recipe's work folder."""
    from nemo_vlm_ptq.constants import BASELINE
    from nemo_vlm_ptq.targets.registry import TARGETS
    from nemo_vlm_ptq.workdir import store

    workdir = Path(recipe.workdir)
    exports: dict[str, dict[str, Path]] = {}
    errors: list[dict[str, Any]] = []
    verify, scores = {}, {}
    for name in recipe.quantize.format:
        targets = recipe.export.targets
        folders = {target: workdir / name / TARGETS[target].folder for target in targets}
        exports[name] = {
            target: folder
            for target, folder in folders.items()
            if (folder / store.MANIFEST).is_file()
        }
        solved = store.read_manifest(workdir / name / "scales")
        if solved is not None:
            errors += [{"format": name, **entry} for entry in solved["facts"]["layers"]]
        if (file := workdir / name / "verify.json").is_file():
            verify[name] = store.read_json(file)
    for name in (BASELINE, *recipe.quantize.format):
        if (file := workdir / name / "evaluate" / "gqa.json").is_file():
            scores[name] = store.read_json(file)
    page = workdir / "report" / "index.html"
    return QuantizeResult(
        workdir=workdir,
        exports=exports,
        errors=errors,
        verify=verify,
        scores=scores,
        report=page if page.is_file() else None,
    )


def _section(sections: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = sections.get(name, {})
    if not isinstance(section, Mapping):
        raise UserError(f"{name} must be a dictionary of recipe keys, got {section!r}")
    return dict(section)


def _run_process(recipe: Path) -> None:
    """Run a recipe in processes of its own and forward their log to sys.stderr.

    sys.stderr may be a notebook's, which no subprocess can write to. Carriage returns are kept, so
    that a progress bar stays on one line.
    """
    command = [sys.executable, "-m", "nemo_vlm_ptq", "run", str(recipe)]
    reason = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in io.TextIOWrapper(process.stderr, encoding="utf-8", newline=""):
            if line.startswith(ERROR_PREFIX):
                reason = line.removeprefix(ERROR_PREFIX).rstrip("\n")
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
    if process.returncode == 2:
        raise UserError(reason)
    if process.returncode == 3:
        raise VerificationError(reason)
    if process.returncode:
        raise RuntimeError(reason or f"the run ended with exit code {process.returncode}")
