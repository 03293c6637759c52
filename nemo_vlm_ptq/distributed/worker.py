"""What a rank does: join the others, run stages, print the result once."""

from __future__ import annotations

import gc
from collections.abc import Mapping

from nemo_vlm_ptq.constants import STAGE_GROUPS
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.megatron.parallel_context import parallel_context
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.stages import run_stages


def run_worker(command: str, plan: Plan, options: Mapping[str, str]) -> int:
    """Run a command on this rank; 0 when done."""
    gc.enable()
    with parallel_context(plan.recipe.parallel.model_dump()) as own:
        job = RunContext(plan, own)
        if command == "logits":
            from nemo_vlm_ptq.stages.logits import write_logits

            write_logits(job, options)
            return 0
        names = plan.recipe.stages if command == "run" else STAGE_GROUPS.get(command, (command,))
        run_stages(job, names)
    return 0
