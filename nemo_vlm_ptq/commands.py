"""Starting ranks, and being one.

Outside of ranks the recipe is planned first, so that what cannot work is refused in seconds; then
torchrun's own launcher starts the ranks of the recipe on this machine. Inside ranks, whoever
started them, the stages run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.constants import LOGITS_KEYS, STAGE_GROUPS, STAGES
from nemo_vlm_ptq.distributed import mpi
from nemo_vlm_ptq.errors import UserError, VerificationError, disk_write_error
from nemo_vlm_ptq.workdir.status import record_failure
from nemo_vlm_ptq.workdir.store import in_progress_marker

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import (
        ChildFailedError,
        ProcessFailure,
    )

    from nemo_vlm_ptq.planning.plan import Plan
    from nemo_vlm_ptq.recipe import Parallel, Recipe

PARENT_VARIABLE = "NEMO_VLM_PTQ_PARENT"  # set for ranks that this command started itself


def inside_ranks() -> bool:
    """True when a launcher has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_command(
    command: str,
    recipe_name: str,
    overrides: list[str],
    *,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Plan, and run the command on ranks; dry_run prints what `build` would run.

    as_json: `plan` prints facts for other programs, and does not look at this machine.

    Raises:
        UserError: the recipe cannot work.
        ProofError: a proof failed on a rank.
    """
    from nemo_vlm_ptq.recipe import load_recipe

    if mpi.started_by_mpirun() and not inside_ranks():
        mpi.adopt_mpi_ranks()
    if command == "evaluate":
        overrides = [f"evaluate.{word}" if word[:5] == "from=" else word for word in overrides]
    own = [word for word in overrides if word.split("=")[0] in LOGITS_KEYS]
    recipe = load_recipe(recipe_name, [word for word in overrides if word not in own])
    try:
        return _plan_and_run(command, recipe, own, dry_run, as_json)
    except Exception as error:
        if inside_ranks() and not _lost_a_peer(error):
            record_failure(Path(recipe.workdir), command, os.environ["RANK"], error)
        raise


def _plan_and_run(
    command: str, recipe: Recipe, own: list[str], dry_run: bool, as_json: bool
) -> int:
    """The plan of a recipe, and then the command; own: words of `logits`."""
    from nemo_vlm_ptq.planning.auto_layout import (
        check_evaluate_memory,
        detect_machine,
        resolve_layout,
    )
    from nemo_vlm_ptq.planning.forecast import describe_plan
    from nemo_vlm_ptq.planning.plan import make_plan
    from nemo_vlm_ptq.targets.trtllm.engine.commands import build_script, check_engine
    from nemo_vlm_ptq.targets.trtllm.engine.installation import find_builder

    plan = make_plan(recipe)
    stages = recipe.stages if command in ("run", "plan") else STAGE_GROUPS.get(command, (command,))
    options = [word.partition("=") for word in own]
    for key, equals, _ in options:
        if command != "logits" or not equals:
            raise UserError(f"{key} is an option of logits; write logits RECIPE {key}=...")
    _try_out(plan, stages)
    if _needs_engines(command, recipe, stages, own):
        check_engine(plan)
        if dry_run:
            print(build_script(plan), end="")
            return 0
        if command != "plan":
            find_builder(plan)
    if command == "plan" and Path(recipe.workdir).exists():
        from nemo_vlm_ptq.stages.workdir_check import check_workdir  # slow to import

        check_workdir(plan, Path(recipe.workdir))
    if as_json:
        print(json.dumps(_facts(plan), indent=1))
        return 0
    plan, why = resolve_layout(plan, detect_machine)
    check_evaluate_memory(plan, stages, detect_machine)
    if command == "plan":
        print(describe_plan(plan, why))
        return 0
    if not inside_ranks():
        return _start_ranks(plan, sys.argv[1:])
    return _be_a_rank(command, plan, {key: value for key, _, value in options})


def _try_out(plan: Plan, stages: Iterable[str]) -> None:
    """Try what can be tried, unless the command that started this rank has."""
    from nemo_vlm_ptq.planning.preflight import run_preflight

    if PARENT_VARIABLE not in os.environ:
        run_preflight(plan, stages)


def _facts(plan: Plan) -> dict[str, Any]:
    """What a program that starts ranks elsewhere wants to know of a recipe.

    engine_capability: least compute capability of a GPU that runs a format's engine.
    """
    from nemo_vlm_ptq.targets.trtllm.engine.installation import CAPABILITY

    recipe = plan.recipe
    formats = {
        fmt.name: {
            "targets": plan.targets(fmt),
            "engine_capability": CAPABILITY.get(fmt.quant_algo, (0, 0)),
        }
        for fmt in plan.formats
    }
    return {
        "model": str(plan.folder),
        "workdir": recipe.workdir,
        "stages": [name for name in STAGES if name in recipe.stages],
        "parallel": recipe.parallel.model_dump(),
        "formats": formats,
    }


def _needs_engines(command: str, recipe: Recipe, stages: Iterable[str], words: list[str]) -> bool:
    """The command builds engines or asks them."""
    asked = "evaluate" in stages and recipe.evaluate.form == "engine"
    return "build" in stages or asked or (command == "logits" and "from=engine" in words)


def _be_a_rank(command: str, plan: Plan, options: Mapping[str, str]) -> int:
    """Run the command on this rank; a bug is noted for the launcher in one line."""
    from nemo_vlm_ptq.distributed.worker import run_worker

    try:
        return run_worker(command, plan, options)
    except (UserError, VerificationError):
        raise
    except Exception as error:
        if (reason := disk_write_error(error, Path(plan.recipe.workdir))) is not None:
            raise UserError(f"{plan.recipe.workdir} cannot be written: {reason}") from error
        if not _lost_a_peer(error):
            first = (str(error).strip().splitlines() or [""])[0]
            _leave_note(f"{type(error).__name__}: {first}", 1)
        raise


def _ranks_wanted(parallel: Parallel) -> int:
    """Ranks of the layout; data=auto takes all GPUs of this machine, and one without GPUs."""
    model = int(parallel.tensor) * int(parallel.pipeline)
    if parallel.data != "auto":
        return model * parallel.data
    import torch

    return model * max(1, torch.cuda.device_count() // model)


def _start_ranks(plan: Plan, words: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    parallel = plan.recipe.parallel
    chosen = [f"parallel.tensor={parallel.tensor}", f"parallel.pipeline={parallel.pipeline}"]
    count = _ranks_wanted(parallel)
    # torchrun's own account of a failure; ours names the cause in one line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    quiet = {
        PARENT_VARIABLE: "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    os.environ.update({key: os.environ.get(key, value) for key, value in quiet.items()})
    work = Path(plan.recipe.workdir)
    before = _being_written(work)
    with tempfile.TemporaryDirectory(prefix="nemo-vlm-ptq-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"nemo-vlm-ptq-{os.getpid()}",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "nemo_vlm_ptq", *words, *chosen)
        except ChildFailedError as error:
            now = [item for item in _being_written(work).items() if item not in before.items()]
            folders = [folder for folder, _ in sorted(now, key=lambda item: item[1])]
            return _explain(error, folders[-1] if folders else None)
        except SignalException as stop:
            print(f"nemo-vlm-ptq: stopped by {stop.sigval.name}", file=sys.stderr)
            return 128 + stop.sigval
    return 0


def _being_written(work: Path) -> dict[Path, int]:
    """Folders of stages that are not finished -> when they were begun, by the file system."""
    name = in_progress_marker(work / "*").name
    found = [*work.glob(name), *work.glob(f"*/{name}")]
    start, end = name.split("*")
    return {
        path.with_name(path.name.removeprefix(start).removesuffix(end)): path.stat().st_mtime_ns
        for path in found
    }


def _explain(error: ChildFailedError, folder: Path | None) -> int:
    """The cause of the first rank that failed, as this command's own failure.

    Ranks that lost their peer may fail in the same second; the one that tells most counts.
    SIGTERM tells nothing: the launcher ends the rest with it.
    """
    rank, failure = error.get_first_failure()
    for other, candidate in sorted(error.failures.items()):
        if _tells(candidate) > _tells(failure) and (
            candidate.exitcode in (2, 3) or candidate.timestamp == failure.timestamp
        ):
            rank, failure = other, candidate
    noted: Any = failure.message  # torch's stub calls it a str
    message = f"exit code {failure.exitcode}, see above"
    if isinstance(noted, dict):
        message = noted["message"]
    if failure.exitcode == 2:
        raise UserError(message) from None
    if failure.exitcode == 3:
        raise VerificationError(message) from None
    if failure.exitcode < 0:
        hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        cause = f"was ended by signal {failure.signal_name()}{hint}"
    else:
        cause = f"failed: {message}"
    place = f" while {folder} was being written" if folder else ""
    print(f"nemo-vlm-ptq: error: rank {rank} {cause}{place}", file=sys.stderr)
    return 1


def _tells(failure: ProcessFailure) -> int:
    """How much the end of a rank says about the cause."""
    if failure.exitcode in (2, 3):
        return 3
    if failure.exitcode == -signal.SIGTERM:
        return 0
    return 2 if failure.exitcode < 0 or isinstance(failure.message, dict) else 1


def _lost_a_peer(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "by peer" in str(error)


def wait_for_end(error: RuntimeError) -> None:
    """A rank whose peer has gone gives the launcher time to end it: the peer tells the reason."""
    if inside_ranks() and _lost_a_peer(error):
        time.sleep(15)


def report_failure(message: str, code: int) -> None:
    """One line on stderr, or, on a rank that this command started, a note for the parent."""
    _leave_note(message, code)
    if not (inside_ranks() and PARENT_VARIABLE in os.environ):
        sys.stderr.write(f"nemo-vlm-ptq: error: {message}\n")  # at once: ranks share the stream


def _leave_note(message: str, code: int) -> None:
    """Tell the launcher of this rank why it ends; torchrun prints it, our own makes it a line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if inside_ranks() and path:
        extra = {"timestamp": str(int(time.time())), "exit_code": code}
        note = {"message": {"message": message, "extraInfo": extra}}
        Path(path).write_text(json.dumps(note))
