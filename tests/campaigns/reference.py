"""The undisturbed run of tests/campaigns/runs.py, and workdirs compared with its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from campaigns.children import command, in_child
from campaigns.processes import ROOT, RUN_SECONDS, DefectError

FORMATS = ("int4_awq", "fp8")
UNEQUAL = {  # times, what failed, and errors of layers, measured beside formats that search
    "failures.jsonl", "report/index.html", "report/layers.png",
}  # fmt: skip


@dataclass(frozen=True)
class Campaign:
    """The folder of cases, the stages of their runs, and the undisturbed run."""

    work: Path
    stages: Sequence[str]
    seconds: float = 0.0
    files: Mapping[str, Any] = field(default_factory=dict)

    def write_recipe(self, folder: Path, **calibration: Any) -> Path:
        """Write a recipe, YAML as JSON, for a workdir in a new folder."""
        folder.mkdir(parents=True)
        data = {"data": "scenes", "samples": 4, "micro_batch": 1}
        recipe = folder / "recipe.yaml"
        tree = {
            "model": str(ROOT / "assets" / "tiny-llava"),
            "workdir": str(folder / "work"),
            "stages": [*self.stages],
            "quantize": {"format": [*FORMATS]},
            "calibration": data | {"window": 1, "keep_statistics": True} | calibration,
            "evaluate": {"data": "scenes", "limit": 2},
            "export": {"targets": ["compressed_tensors", "trtllm"]},
        }
        recipe.write_text(json.dumps(tree))
        return recipe

    def compare(self, folder: Path, kept: bool = True) -> None:
        """Compare a workdir with the undisturbed run's.

        Raises:
            DefectError: a file differs, is missing, or is not one of a finished run.
        """
        found = contents(folder / "work")
        names = [n for n in sorted(found.keys() | self.files.keys()) if kept or "statis" not in n]
        different = [name for name in names if found.get(name) != self.files.get(name)]
        if different:
            raise DefectError(f"{len(different)} files are not the undisturbed run's: {different}")


def contents(work: Path) -> dict[str, Any]:
    """Return name -> what must be the same in all finished runs, for every file of a workdir."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        name = str(path.relative_to(work))
        if path.name == "manifest.json":
            found[name] = json.loads(path.read_text())["files"]
        elif path.name == "verify.json":
            found[name] = [check["name"] for check in json.loads(path.read_text())["checks"]]
        elif name not in UNEQUAL:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stage_of(work: Path) -> str:
    """Return the stage that a run of a workdir is at."""
    finished = {
        "start": work.exists(),
        "observe": (work / "statistics/manifest.json").exists(),
        "solve": all((work / name / "scales/manifest.json").exists() for name in FORMATS),
        "export": all((work / name / "trtllm/manifest.json").exists() for name in FORMATS),
        "verify": all((work / name / "verify.json").exists() for name in FORMATS),
        "evaluate": all((work / name / "evaluate/manifest.json").exists() for name in FORMATS),
    }
    return next((stage for stage, done in finished.items() if not done), "report")


def copy_observed(campaign: Campaign, work: Path) -> None:
    """Copy the undisturbed run's workdir without what came after solve."""
    shutil.copytree(campaign.work / "reference" / "work", work)
    for path in (*work.glob("*/*"), *work.glob("report")):
        if path.parent.name != "statistics" and path.name != "scales":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_reference(work: Path, stages: Sequence[str]) -> Campaign:
    """Run the recipe undisturbed, and import what the run imports, for all children to come."""
    campaign = Campaign(work, stages)
    recipe = campaign.write_recipe(work / "reference")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, said, modules = run(work / "reference", "run", recipe)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert code == 0, said
    for name in modules:
        with contextlib.suppress(Exception):
            import_module(name)
    return Campaign(work, stages, seconds, contents(work / "reference" / "work"))


def run(folder: Path, *words: str | Path) -> tuple[int, str, list[str]]:
    """Run a command in a child; return its exit code, the last line of stderr, and its modules.

    Raises:
        DefectError: a traceback, or no end in time.
    """
    result, reason = in_child(
        lambda: command([str(word) for word in words], folder / "log"), RUN_SECONDS
    )
    if reason or result["trace"]:
        raise DefectError(f"{words}: {reason or result['trace']}")
    return result["code"], (result["err"].splitlines() or [""])[-1], result["modules"]


def finish(folder: Path, *words: str | Path) -> None:
    """Run a command to its end; raise a DefectError if it fails."""
    code, said, _ = run(folder, *words)
    if code != 0:
        raise DefectError(f"{words}: exit code {code}: {said}")
