"""Run a command on one rank: join the process group, run the stages."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.distributed.launcher import first_line, lost_peer, write_error_file
from nemo_vlm_ptq.errors import UserError, VerificationError, disk_write_error, removed_path
from nemo_vlm_ptq.megatron.parallel_context import parallel_context
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.stages import run_stages


def run_worker(command: str, plan: Plan, options: Mapping[str, str]) -> int:
    """Run a command on this rank and return its exit code.

    Args:
        command: run, a stage, a group of stages, or logits.
        plan: its parallel sizes are numbers, data parallelism apart.
        options: of the logits command.

    Raises:
        UserError: an error that the user can fix, a full disk among them.
        VerificationError: verification failed or a quality gate was missed.
    """
    gc.enable()
    try:
        with parallel_context(plan.recipe.parallel.model_dump()) as parallel:
            context = RunContext(plan=plan, parallel=parallel)
            if command == "logits":
                from nemo_vlm_ptq.stages.logits import write_logits

                write_logits(context, options)
            else:
                run_stages(context, plan.recipe.stages_of(command))
    except (UserError, VerificationError):
        raise
    except Exception as error:
        _explain_bug(error, Path(plan.recipe.workdir))
        raise
    return 0


def _explain_bug(error: Exception, workdir: Path) -> None:
    """Turn disk errors into a UserError, and leave any other bug's first line to the launcher."""
    if (removed := removed_path(error, workdir)) is not None:
        line = f"{removed} was removed while it was in use; run the same command again"
        raise UserError(line) from error
    if (reason := disk_write_error(error, workdir)) is not None:
        raise UserError(f"{workdir} cannot be written: {reason}") from error
    if not lost_peer(error):
        write_error_file(first_line(error), 1)
