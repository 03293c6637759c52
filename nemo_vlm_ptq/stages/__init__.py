"""The stages in order; each reads the folders of earlier stages and writes its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.stages.build import build
from nemo_vlm_ptq.stages.evaluate import evaluate
from nemo_vlm_ptq.stages.export import export
from nemo_vlm_ptq.stages.import_model import import_model
from nemo_vlm_ptq.stages.observe import observe
from nemo_vlm_ptq.stages.report import report
from nemo_vlm_ptq.stages.solve import solve
from nemo_vlm_ptq.stages.verify import verify

STAGE_FUNCTIONS: dict[str, Callable[[RunContext], None]] = {
    "import": import_model,
    "observe": observe,
    "solve": solve,
    "export": export,
    "verify": verify,
    "build": build,
    "evaluate": evaluate,
    "report": report,
}


def run_stages(context: RunContext, names: Iterable[str]) -> None:
    """Run the named stages in their order; finished ones are skipped."""
    context = replace(context, stages=frozenset(names))
    for name, stage in STAGE_FUNCTIONS.items():
        if name in context.stages:
            stage(context)
