"""Compare the finished stages of a workdir with a recipe, without ranks, before anything runs."""

from __future__ import annotations

from pathlib import Path

from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.stages.settings import observed_settings, solve_settings, source_settings
from nemo_vlm_ptq.workdir import store


def check_workdir(plan: Plan, work: Path) -> None:
    """Check that the finished model, statistics and scales were made with this recipe.

    Raises:
        UserError: they were made with another recipe, or the folder holds files of another program.
    """
    store.is_finished(work / "megatron", source_settings(plan))
    if "observe" not in plan.recipe.stages and plan.recipe.calibration.data is None:
        return
    observed_settings(plan, work / "statistics")
    for fmt in plan.formats:
        store.is_finished(work / fmt.name / "scales", solve_settings(plan, work, fmt))
