"""Whether what lies in a workdir is of this recipe, told before anything runs; needs no ranks."""

from __future__ import annotations

from pathlib import Path

from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.stages.import_model import import_settings
from nemo_vlm_ptq.stages.observe import observe_settings
from nemo_vlm_ptq.stages.solve import solve_inputs
from nemo_vlm_ptq.workdir import store


def check_workdir(plan: Plan, work: Path) -> None:
    """Compare the model, the statistics and the scales that are finished with the recipe.

    Raises:
        UserError: some are another recipe's, are not ours, or lack what a format needs.
    """
    if not store.is_done(work / "megatron", import_settings(plan)):
        return
    if store.is_done(work / "statistics", observe_settings(plan, work)):
        for fmt in plan.formats:
            store.is_done(work / fmt.name / "scales", solve_inputs(plan, work, fmt))
