"""Run one command of a recipe: plan it, then run it on ranks.

Outside of ranks the recipe is planned first, so that what cannot work is rejected in seconds. Then
its ranks are started on this machine; a single rank is this process. Inside ranks the stages run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.constants import LOGITS_OPTIONS, STAGES
from nemo_vlm_ptq.distributed import launcher, mpi
from nemo_vlm_ptq.distributed.layout import data_parallel_size
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.workdir.lock import lock_workdir, locked_formats
from nemo_vlm_ptq.workdir.status import record_failure

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan
    from nemo_vlm_ptq.recipe import Parallel, Recipe


def run_command(
    command: str,
    recipe_name: str,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    as_json: bool = False,
    again: bool = False,
) -> int:
    """Plan a recipe and run a command of it.

    Args:
        command: run, plan, logits, a stage, or a group of stages.
        recipe_name: file, or name of a shipped recipe.
        overrides: KEY=VALUE words, options of the logits command among them.
        dry_run: print what `build` would run.
        as_json: `plan` prints facts for other programs, and does not inspect this machine.
        again: `verify` forgets what has passed before.

    Returns:
        The exit code.

    Raises:
        UserError: the recipe cannot work.
        VerificationError: verification failed on a rank, or a quality gate was missed.
    """
    from nemo_vlm_ptq.recipe import load_recipe

    if mpi.started_by_mpirun() and not launcher.inside_ranks():
        mpi.set_env_from_mpi()
    if command == "evaluate":
        overrides = [f"evaluate.{word}" if word[:5] == "from=" else word for word in overrides]
    options = [word for word in overrides if word.split("=")[0] in LOGITS_OPTIONS]
    recipe = load_recipe(recipe_name, [word for word in overrides if word not in options])
    logits_options = _parse_logits_options(command, options)
    inside = launcher.inside_ranks()
    with _failures_recorded(command, recipe) if inside else nullcontext():
        plan = _prepare(command, recipe, logits_options, dry_run=dry_run)
        if command == "plan" or dry_run:
            return _print_plan(command, plan, as_json=as_json)
        plan, _ = _resolve_layout(command, plan)
        if inside:  # before the workdir is created
            sizes = plan.recipe.parallel
            data = None if sizes.data == "auto" else sizes.data
            world = int(os.environ["WORLD_SIZE"])
            data_parallel_size(int(sizes.tensor), int(sizes.pipeline), world, data)
    with _owned_workdir(command, plan):
        if again and not launcher.started_by_us():
            for fmt in plan.formats:
                Path(plan.recipe.workdir, fmt.name, "verify.json").unlink(missing_ok=True)
        if inside:
            with _failures_recorded(command, recipe):
                return _run_rank(command, plan, logits_options)
        ranks = _rank_count(plan.recipe.parallel)
        return _start_ranks(plan, ranks) if ranks > 1 else _run_here(command, plan, logits_options)


def _owned_workdir(command: str, plan: Plan) -> AbstractContextManager[None]:
    """Return a context in which the run owns what it writes of the workdir.

    The command that starts ranks owns it, or rank 0 of another launcher's. logits writes nothing
    there.
    """
    follows = launcher.planned_by_parent() or os.environ.get("RANK", "0") != "0"
    if command == "logits" or (launcher.inside_ranks() and follows):
        return nullcontext()
    formats = locked_formats(plan.recipe.stages_of(command), [fmt.name for fmt in plan.formats])
    return lock_workdir(Path(plan.recipe.workdir), command, formats)


def _prepare(
    command: str, recipe: Recipe, logits_options: dict[str, str], *, dry_run: bool
) -> Plan:
    """Plan a recipe, and run the preflight check and the checks of the engine build."""
    from nemo_vlm_ptq.planning.make_plan import make_plan
    from nemo_vlm_ptq.planning.preflight import run_preflight
    from nemo_vlm_ptq.targets.trtllm.engine.commands import check_engine
    from nemo_vlm_ptq.targets.trtllm.engine.installation import find_installation

    plan, stages = make_plan(recipe), recipe.stages_of(command)
    if not launcher.planned_by_parent():
        run_preflight(plan, stages)
    asks_engine = "evaluate" in stages and recipe.evaluate.form == "engine"
    if "build" in stages or asks_engine or logits_options.get("from") == "engine":
        check_engine(plan)
        if command != "plan" and not dry_run:
            find_installation(plan)
    return plan


def _print_plan(command: str, plan: Plan, *, as_json: bool) -> int:
    """Print the commands of `build --dry-run`, or the plan as text or JSON."""
    from nemo_vlm_ptq.planning.auto_layout import detect_machine
    from nemo_vlm_ptq.planning.describe import describe_plan
    from nemo_vlm_ptq.targets.trtllm.engine.commands import build_script

    workdir = Path(plan.recipe.workdir)
    if command == "build":
        print(build_script(plan), end="")
        return 0
    if workdir.exists():
        from nemo_vlm_ptq.stages.workdir_check import check_workdir  # slow to import

        check_workdir(plan, workdir)
    if as_json:
        print(json.dumps(_plan_facts(plan), indent=1))
        return 0
    plan, reason = _resolve_layout(command, plan)
    ranks = _rank_count(plan.recipe.parallel)
    data = ranks // (int(plan.recipe.parallel.tensor) * int(plan.recipe.parallel.pipeline))
    print(describe_plan(plan, detect_machine().gpu_memory, data, reason))
    return 0


def _resolve_layout(command: str, plan: Plan) -> tuple[Plan, str]:
    """Return the plan with numbers in place of `auto`, and why these."""
    from nemo_vlm_ptq.planning.auto_layout import (
        check_evaluate_memory,
        detect_machine,
        resolve_layout,
    )

    plan, reason = resolve_layout(plan, detect_machine)
    check_evaluate_memory(plan, plan.recipe.stages_of(command), detect_machine)
    return plan, reason


def _run_rank(command: str, plan: Plan, logits_options: dict[str, str]) -> int:
    from nemo_vlm_ptq.stages.worker import run_worker  # slow to import

    return run_worker(command, plan, logits_options)


def _run_here(command: str, plan: Plan, logits_options: dict[str, str]) -> int:
    """Run the only rank in this process."""

    def run() -> int:
        with _failures_recorded(command, plan.recipe):
            return _run_rank(command, plan, logits_options)

    return launcher.run_here(run, Path(plan.recipe.workdir))


def _start_ranks(plan: Plan, ranks: int) -> int:
    parallel = plan.recipe.parallel
    layout = [f"parallel.tensor={parallel.tensor}", f"parallel.pipeline={parallel.pipeline}"]
    arguments = [*sys.argv[1:], *layout]
    return launcher.start_ranks(ranks, arguments, Path(plan.recipe.workdir))


def _rank_count(parallel: Parallel) -> int:
    """Return the ranks of the layout; data=auto uses all GPUs of this machine."""
    model_parallel = int(parallel.tensor) * int(parallel.pipeline)
    if parallel.data != "auto":
        return model_parallel * parallel.data
    import torch

    return model_parallel * max(1, torch.cuda.device_count() // model_parallel)


def _parse_logits_options(command: str, words: Sequence[str]) -> dict[str, str]:
    for word in words:
        key, equals, _ = word.partition("=")
        if command != "logits" or not equals:
            raise UserError(f"{key} is an option of logits: logits RECIPE {key}=...")
    return dict(word.split("=", 1) for word in words)


@contextmanager
def _failures_recorded(command: str, recipe: Recipe) -> Iterator[None]:
    """Record an error of this rank in the workdir, unless it only lost a peer."""
    try:
        yield
    except Exception as error:
        if not launcher.lost_peer(error):
            rank = os.environ.get("RANK", "0")
            record_failure(Path(recipe.workdir), command, rank, error)
        raise


def _plan_facts(plan: Plan) -> dict[str, Any]:
    """Return what a program that starts ranks elsewhere needs to know of a recipe.

    engine_capability: least compute capability of a GPU that runs a format's engine.
    """
    from nemo_vlm_ptq.targets.trtllm.engine.installation import CAPABILITY

    recipe = plan.recipe
    return {
        "model": str(plan.folder),
        "workdir": recipe.workdir,
        "stages": [name for name in STAGES if name in recipe.stages],
        "parallel": recipe.parallel.model_dump(),
        "formats": {
            fmt.name: {
                "targets": plan.targets(fmt),
                "engine_capability": CAPABILITY.get(fmt.quant_algo, (0, 0)),
            }
            for fmt in plan.formats
        },
    }
