"""What a rank does: join the others, run stages, print the result once."""

from __future__ import annotations

import gc
from collections.abc import Mapping

from nemo_vlm_ptq.job import Job
from nemo_vlm_ptq.megatron.session import session
from nemo_vlm_ptq.names import GROUPS
from nemo_vlm_ptq.plan import Plan
from nemo_vlm_ptq.stages import run_stages


def run_rank(command: str, plan: Plan, options: Mapping[str, str]) -> int:
    """Run a command on this rank; 0 when done."""
    gc.enable()
    with session(plan.recipe.parallel.model_dump()) as own:
        job = Job(plan, own)
        if command == "logits":
            from nemo_vlm_ptq.stages.logits import write_logits

            write_logits(job, options)
            return 0
        names = plan.recipe.stages if command == "run" else GROUPS.get(command, (command,))
        run_stages(job, names)
    return 0
