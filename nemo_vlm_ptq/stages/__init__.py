"""The stages in order; each reads the folders of earlier stages and writes its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module

from nemo_vlm_ptq.constants import STAGES
from nemo_vlm_ptq.context import RunContext

MODULES = {"import": "import_model"}  # where the module is not named like the stage


def load_stage(name: str) -> Callable[[RunContext], None]:
    """Import a stage's module, which may take seconds, and return its function."""
    module = MODULES.get(name, name)
    stage: Callable[[RunContext], None] = getattr(import_module(f"{__name__}.{module}"), module)
    return stage


def run_stages(context: RunContext, names: Iterable[str]) -> None:
    """Run the named stages in their order; finished ones are skipped."""
    context = replace(context, stages=frozenset(names))
    for name in STAGES:
        if name in context.stages:
            load_stage(name)(context)
