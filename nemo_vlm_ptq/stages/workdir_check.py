"""Compare the finished stages of a workdir with a recipe, without ranks, before anything runs."""

from __future__ import annotations

from pathlib import Path

from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.stages.import_model import import_settings
from nemo_vlm_ptq.stages.observe import observe_settings
from nemo_vlm_ptq.stages.solve import solve_inputs
from nemo_vlm_ptq.workdir import store


def check_workdir(plan: Plan, work: Path) -> None:
    """Check that the finished model, statistics and scales were made with this recipe.

    Raises:
        UserError: they were made with another recipe, lack what a format needs, or the folder holds
            files of another program.
    """
    if not store.is_finished(work / "megatron", import_settings(plan)):
        return
    if "observe" not in plan.recipe.stages and plan.recipe.calibration.data is None:
        return
    if store.is_finished(work / "statistics", observe_settings(plan, work)):
        for fmt in plan.formats:
            store.is_finished(work / fmt.name / "scales", solve_inputs(plan, work, fmt))
