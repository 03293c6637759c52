"""Status of a workdir: its stages, the Slurm jobs that work on it, and the last error.

Only small files are read and squeue is called, so that the command is quick on any node. This
is the only module that depends on Slurm: slurm/submit.sh writes the recipe's stages and its jobs to
WORKDIR/slurm.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.constants import DEFAULT_STAGES
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.registry import TARGETS
from nemo_vlm_ptq.workdir import store

FAILURE_KEYS = {"time", "command", "rank", "node", "job", "message"}
FAILURES_FILE = "failures.jsonl"
RECIPE_FACTS_FILE = Path("slurm", "recipe.json")  # written by slurm/submit.sh
JOBS_FILE = Path("slurm", "jobs")  # written by slurm/submit.sh
SHARED_STAGE_FOLDERS = {"import": "megatron", "observe": "statistics", "report": "report"}
FINISHED, IN_PROGRESS, MISSING, FAILED = "finished", "in progress", "missing", "failed"
DAMAGED = "damaged"  # its record cannot be read
HEALTHY_JOB_STATES = (
    "COMPLETED", "COMPLETING", "RUNNING", "PENDING", "CONFIGURING", "REQUEUED",
)  # fmt: skip


def record_failure(work: Path, command: str, rank: str, error: Exception) -> None:
    """Append an error to the failures of a workdir; do nothing if the workdir does not exist.

    Args:
        work: the workdir.
        command: the command that failed.
        rank: global rank on which it failed.
        error: its first line is recorded.
    """
    if not work.is_dir():
        return
    first = (str(error).strip().splitlines() or [""])[0]
    expected = isinstance(error, UserError | VerificationError)
    record = {
        "time": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "command": command,
        "rank": int(rank),
        "node": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID")
        or os.environ.get("TORCHELASTIC_RUN_ID")  # of torchrun
        or os.environ.get("NEMO_VLM_PTQ_PARENT")
        or f"process {os.getpid()}",
        "message": first if expected else f"{type(error).__name__}: {first}",
    }
    line = json.dumps(record) + "\n"  # one write, as ranks append to the same file
    with contextlib.suppress(OSError), (work / FAILURES_FILE).open("a") as file:  # e.g. a full disk
        file.write(line)


def format_status(work: Path, *, as_json: bool) -> str:
    """Return the status of a workdir as text or JSON.

    Raises:
        UserError: the folder does not exist, or a record of submit.sh is damaged.
    """
    if not work.is_dir():
        raise UserError(f"{work} is not a folder; expected the workdir of a recipe")
    status = read_status(work)
    return json.dumps(status, indent=1) if as_json else _as_text(status)


def read_status(work: Path) -> dict[str, Any]:
    """Return the stages, formats, jobs and last error of a workdir as plain JSON types."""
    facts = _recipe_facts(work)
    shared = {
        name: _shared_stage_state(work, name)
        for name in SHARED_STAGE_FOLDERS
        if name in facts["stages"]
    }
    formats = {
        name: {
            stage: state
            for stage, state in _format_states(work / name, entry["targets"]).items()
            if stage in facts["stages"]
        }
        for name, entry in facts["formats"].items()
    }
    jobs = _jobs(work)
    states = [
        *shared.values(),
        *(state for by_stage in formats.values() for state in by_stage.values()),
    ]
    all_finished = all(state == FINISHED for state in states)
    return {
        "workdir": str(work),
        "stages": shared,
        "formats": formats,
        "jobs": jobs,
        "last_error": None if all_finished else _last_failure(work),
    }


def _recipe_facts(work: Path) -> dict[str, Any]:
    """Return the stages and formats that submit.sh wrote, else those found in the workdir."""
    if (path := work / RECIPE_FACTS_FILE).is_file():
        facts = _read_record(path)
        if not _are_facts(facts):
            raise UserError(f"{path} is damaged; run slurm/submit.sh again, or remove it")
        return facts
    formats = {
        name: {
            "targets": [
                target
                for target, spec in TARGETS.items()
                if _state(work / name / spec.folder) != MISSING
            ]
        }
        for name in FORMATS
        if (work / name).is_dir()
    }
    built = any(_state(work / name / "engine") != MISSING for name in formats)
    return {"stages": [*DEFAULT_STAGES, *(["build"] if built else [])], "formats": formats}


def _read_record(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty if it is damaged."""
    try:
        return store.read_json(path)
    except (UserError, OSError):
        return {}


def _are_facts(facts: Mapping[str, Any]) -> bool:
    """Return whether what submit.sh wrote of a recipe has its types and known names."""
    stages, formats = facts.get("stages"), facts.get("formats")
    if not isinstance(stages, list) or not isinstance(formats, dict):
        return False
    entries = [entry.get("targets") for entry in formats.values() if isinstance(entry, dict)]
    known = [isinstance(one, list) and all(name in [*TARGETS] for name in one) for one in entries]
    return len(entries) == len(formats) and all(known) and set(formats) <= set(FORMATS)


def _state(folder: Path) -> str:
    """Return the state of one stage folder."""
    if (folder / store.MANIFEST).is_file():
        try:
            store.read_manifest(folder)
        except UserError:
            return DAMAGED
        return FINISHED
    return IN_PROGRESS if store.in_progress_marker(folder).exists() else MISSING


def _combine_states(states: Sequence[str]) -> str:
    """Return the state of a stage that writes several folders."""
    if not states or set(states) == {MISSING}:
        return MISSING
    if DAMAGED in states:
        return DAMAGED
    return FINISHED if set(states) == {FINISHED} else IN_PROGRESS


def _shared_stage_state(work: Path, stage: str) -> str:
    """Return the state of a stage that all formats share; of observe, with its progress record."""
    folder = work / SHARED_STAGE_FOLDERS[stage]
    if stage == "report":
        return FINISHED if (folder / "index.html").is_file() else MISSING
    state = _state(folder)
    if stage == "observe" and state == IN_PROGRESS and (folder / store.PROGRESS).is_file():
        record: Any = _read_record(folder / store.PROGRESS).get("record")
        with contextlib.suppress(TypeError, KeyError, AttributeError):  # damaged: it is not used
            samples = min((len(held["ids"]) for held in record["held"].values()), default=0)
            finished = len(record["finished"])
            state += f", {finished} layers finished, {samples} samples of the other layers saved"
    return state


def _format_states(folder: Path, targets: Iterable[str]) -> dict[str, str]:
    """Return the state of each stage that runs per format."""
    verify = folder / "verify.json"
    verified = MISSING
    if verify.is_file():
        passed = _read_record(verify).get("passed")
        verified = {True: FINISHED, False: FAILED}[passed] if type(passed) is bool else DAMAGED
    exports = [_state(folder / TARGETS[target].folder) for target in targets]
    return {
        "solve": _state(folder / "scales"),
        "export": _combine_states(exports),
        "verify": verified,
        "build": _state(folder / "engine"),
        "evaluate": _state(folder / "evaluate"),
    }


def _last_failure(work: Path) -> dict[str, Any] | None:
    """Return the first failure of the last failed job; later ones usually follow from it."""
    path = work / FAILURES_FILE
    if not path.is_file():
        return None
    records = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # a line that was cut
                records.append(json.loads(line))
    records = [r for r in records if isinstance(r, dict) and set(r) >= FAILURE_KEYS]
    return next((r for r in records if r["job"] == records[-1]["job"]), None)


def _jobs(work: Path) -> list[dict[str, str]]:
    """Return the jobs that submit.sh queued: id, name, Slurm state, nodes or reason, log."""
    path = work / JOBS_FILE
    if not path.is_file():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines()
    if not all(re.fullmatch(r"\d+ \w+", line, re.ASCII) for line in lines):
        raise UserError(f"{path} is damaged; expected lines 'JOB NAME'; remove it")
    names = dict(line.split() for line in lines)
    known = _query_squeue(names)
    jobs = []
    for number, name in names.items():
        found = [job for job in known if job["id"].split("_")[0] == number]
        jobs += found or [{"id": number, "name": name, "state": "unknown", "where": ""}]
    for job in jobs:
        log = work / "slurm" / f"{job['name']}_{job['id']}.log"
        job["log"] = str(log) if log.is_file() else ""
    return jobs


def _query_squeue(names: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the jobs and array tasks that squeue still lists, or none without squeue."""
    if shutil.which("squeue") is None:
        return []
    command = ["squeue", "-h", "-t", "all", "-j", ",".join(names), "-o", "%i|%j|%T|%R"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    keys = ("id", "name", "state", "where")
    rows = [line.split("|", 3) for line in lines if line.count("|") >= 3]
    jobs = [dict(zip(keys, row, strict=True)) for row in rows]
    return sorted(jobs, key=lambda job: job["id"])


def _as_text(status: Mapping[str, Any]) -> str:
    """Format a status as lines of text, with a table of the formats and one of the jobs."""
    lines = [f"{stage:10}{state}" for stage, state in status["stages"].items()]
    formats = status["formats"]
    if formats:
        stages = list(next(iter(formats.values())))
        rows = [[name, *states.values()] for name, states in formats.items()]
        lines += ["", *_table(["format", *stages], rows)]
    if status["jobs"]:
        rows = [list(job.values()) for job in status["jobs"]]
        for row, job in zip(rows, status["jobs"], strict=True):
            row[-1] = "" if job["state"] in HEALTHY_JOB_STATES else job["log"]
        lines += ["", *_table(["job", "name", "state", "nodes or reason", "log"], rows)]
    error = status["last_error"]
    if error:
        job = f", job {error['job']}" if status["jobs"] else ""
        lines += [
            "",
            f"last error: {error['command']} on {error['node']}, rank {error['rank']}{job}, "
            f"{error['time']}:",
            f"  {error['message']}",
        ]
    return "\n".join(lines)


def _table(header: list[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines with aligned columns."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
