"""The stages in order; each reads the folder before and writes its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from nemo_vlm_ptq.job import Job
from nemo_vlm_ptq.stages.building import build
from nemo_vlm_ptq.stages.evaluating import evaluate
from nemo_vlm_ptq.stages.exporting import export
from nemo_vlm_ptq.stages.importing import import_model
from nemo_vlm_ptq.stages.observing import observe
from nemo_vlm_ptq.stages.proving import verify
from nemo_vlm_ptq.stages.reporting import report
from nemo_vlm_ptq.stages.solving import solve

BY_NAME: dict[str, Callable[[Job], None]] = {
    "import": import_model,
    "observe": observe,
    "solve": solve,
    "export": export,
    "verify": verify,
    "build": build,
    "evaluate": evaluate,
    "report": report,
}


def run_stages(job: Job, names: Iterable[str]) -> None:
    """Run the named stages in their order; finished ones are skipped."""
    job = replace(job, stages=frozenset(names))
    for name, stage in BY_NAME.items():
        if name in job.stages:
            stage(job)
