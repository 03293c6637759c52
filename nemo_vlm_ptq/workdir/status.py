"""How far a workdir is: its stages, the Slurm jobs that work on it, and why the last one failed.

Everything is read from files and asked of squeue, so that it is quick, on any node. This is the one
module that knows of Slurm: slurm/submit.sh leaves the recipe's facts and its jobs in WORKDIR/slurm.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.constants import DEFAULT_STAGES
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.formats import FORMATS, TARGETS
from nemo_vlm_ptq.workdir import store

FAILURES = "failures.jsonl"
FACTS, JOBS = Path("slurm", "recipe.json"), Path("slurm", "jobs")  # of slurm/submit.sh
ONCE = {"import": "megatron", "observe": "statistics", "report": "report"}
FINISHED, BEGUN, MISSING, FAILED = "finished", "in progress", "missing", "failed"
WELL = ("COMPLETED", "COMPLETING", "RUNNING", "PENDING", "CONFIGURING", "REQUEUED")


def record_failure(work: Path, command: str, rank: str, error: Exception) -> None:
    """Add a line to the failures of a workdir, if it is there: what failed, and where."""
    if not work.is_dir():
        return
    first = (str(error).strip().splitlines() or [""])[0]
    user = isinstance(error, UserError | VerificationError)
    record = {
        "time": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "command": command,
        "rank": int(rank),
        "node": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID"),
        "message": first if user else f"{type(error).__name__}: {first}",
    }
    line = json.dumps(record) + "\n"  # ranks share the file; a line is one write
    with contextlib.suppress(OSError), (work / FAILURES).open("a") as file:  # the disk may be full
        file.write(line)


def show_status(work: Path, *, as_json: bool) -> str:
    """The status of a workdir as text or JSON.

    Raises:
        UserError: there is no such folder.
    """
    if not work.is_dir():
        raise UserError(f"{work} is no folder; status wants the workdir of a recipe")
    status = read_status(work)
    return json.dumps(status, indent=1) if as_json else _as_text(work, status)


def read_status(work: Path) -> dict[str, Any]:
    """Stages, formats, jobs and the last error of a workdir, as plain JSON types."""
    facts = _facts(work)
    once = {name: _once(work, name) for name in ONCE if name in facts["stages"]}
    formats = {
        name: {
            stage: state
            for stage, state in _of_format(work / name, row["targets"]).items()
            if stage in facts["stages"]
        }
        for name, row in facts["formats"].items()
    }
    jobs = _jobs(work)
    states = [*once.values(), *(state for row in formats.values() for state in row.values())]
    whole = all(state == FINISHED for state in states)
    return {
        "workdir": str(work),
        "stages": once,
        "formats": formats,
        "jobs": jobs,
        "last_error": None if whole else _last_failure(work),
    }


def _facts(work: Path) -> dict[str, Any]:
    """What submit.sh wrote of the recipe; else what can be told from the folders."""
    if (work / FACTS).is_file():
        facts: dict[str, Any] = store.read_json(work / FACTS)
        return facts
    formats = {
        name: {"targets": [target for target in TARGETS if _state(work / name / target) != MISSING]}
        for name in FORMATS
        if (work / name).is_dir()
    }
    built = any(_state(work / name / "engine") != MISSING for name in formats)
    return {"stages": [*DEFAULT_STAGES, *(["build"] if built else [])], "formats": formats}


def _state(folder: Path) -> str:
    if (folder / store.MANIFEST).is_file():
        return FINISHED
    return BEGUN if store.in_progress_marker(folder).exists() else MISSING


def _together(states: Sequence[str]) -> str:
    """State of a stage that writes several folders."""
    if not states or set(states) == {MISSING}:
        return MISSING
    return FINISHED if set(states) == {FINISHED} else BEGUN


def _once(work: Path, stage: str) -> str:
    """State of a stage that all formats share; of observe, with what it has saved."""
    folder = work / ONCE[stage]
    if stage == "report":
        return FINISHED if (folder / "index.html").is_file() else MISSING
    state = _state(folder)
    if stage == "observe" and state == BEGUN and (folder / store.PROGRESS).is_file():
        record = store.read_json(folder / store.PROGRESS)["record"]
        saved = min((len(one["ids"]) for one in record["held"].values()), default=0)
        state += f", {len(record['finished'])} layers whole, {saved} samples of the others saved"
    return state


def _of_format(folder: Path, targets: Iterable[str]) -> dict[str, str]:
    """Stage -> state, of the stages that each format has."""
    verify = folder / "verify.json"
    passed = store.read_json(verify)["passed"] if verify.is_file() else None
    states = [_state(folder / name) for name in ("scales", "quantized")]
    return {
        "solve": _together(states),
        "export": _together([_state(folder / target) for target in targets]),
        "verify": {None: MISSING, True: FINISHED, False: FAILED}[passed],
        "build": _state(folder / "engine"),
        "evaluate": _state(folder / "evaluate"),
    }


def _last_failure(work: Path) -> dict[str, Any] | None:
    """The first failure of the last job that failed: the others are its consequences."""
    path = work / FAILURES
    if not path.is_file():
        return None
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, Any] = next(one for one in records if one["job"] == records[-1]["job"])
    return found


def _jobs(work: Path) -> list[dict[str, str]]:
    """Jobs that submit.sh queued: id, name, state as Slurm has it, reason or nodes, log."""
    path = work / JOBS
    if not path.is_file():
        return []
    names = dict(line.split() for line in path.read_text().splitlines())
    known = _ask_squeue(names)
    rows = []
    for number, name in names.items():
        found = [row for row in known if row["id"].split("_")[0] == number]
        rows += found or [{"id": number, "name": name, "state": "unknown", "where": ""}]
    for row in rows:
        log = work / "slurm" / f"{row['name']}_{row['id']}.log"
        row["log"] = str(log) if log.is_file() else ""
    return rows


def _ask_squeue(names: Mapping[str, str]) -> list[dict[str, str]]:
    """What squeue still knows of jobs and of the tasks of arrays; nothing where there is none."""
    if shutil.which("squeue") is None:
        return []
    words = ["squeue", "-h", "-t", "all", "-j", ",".join(names), "-o", "%i|%j|%T|%R"]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    keys = ("id", "name", "state", "where")
    rows = [dict(zip(keys, line.split("|", 3), strict=True)) for line in lines]
    return sorted(rows, key=lambda row: row["id"])


def _as_text(work: Path, status: Mapping[str, Any]) -> str:
    lines = [f"{stage:10}{state}" for stage, state in status["stages"].items()]
    formats = status["formats"]
    if formats:
        stages = list(next(iter(formats.values())))
        rows = [[name, *row.values()] for name, row in formats.items()]
        lines += ["", *_table(["format", *stages], rows)]
    if status["jobs"]:
        rows = [list(job.values()) for job in status["jobs"]]
        for row, job in zip(rows, status["jobs"], strict=True):
            row[-1] = "" if job["state"] in WELL else job["log"]
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
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
