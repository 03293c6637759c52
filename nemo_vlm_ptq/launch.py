"""Starting ranks, and being one.

Outside of ranks the recipe is planned first, so that what cannot work is refused in seconds; then
torchrun's own launcher starts the ranks of the recipe on this machine. Inside ranks, whoever
started them, the stages run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_vlm_ptq.errors import ProofError, UserError
from nemo_vlm_ptq.names import GROUPS, LOGITS_KEYS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

PARENT = "NEMO_VLM_PTQ_PARENT"  # set for ranks that this command started itself


def inside_ranks() -> bool:
    """True when a launcher has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(command: str, recipe_name: str, overrides: list[str]) -> int:
    """Plan, and run the command on ranks.

    Raises:
        UserError: the recipe cannot work.
        ProofError: a proof failed on a rank.
    """
    from nemo_vlm_ptq.plan import check_data, make_plan
    from nemo_vlm_ptq.recipe import load_recipe

    own = [word for word in overrides if word.split("=")[0] in LOGITS_KEYS]
    recipe = load_recipe(recipe_name, [word for word in overrides if word not in own])
    plan = make_plan(recipe)
    stages = recipe.stages if command in ("run", "plan") else GROUPS.get(command, (command,))
    check_data(recipe, stages)
    options = [word.partition("=") for word in own]
    for key, equals, _ in options:
        if command != "logits" or not equals:
            raise UserError(f"{key} is an option of logits; write logits RECIPE {key}=...")
    if command == "plan":
        from nemo_vlm_ptq.forecast import describe

        print(describe(plan))
        return 0
    if not inside_ranks():
        return _start_ranks(_ranks_wanted(recipe.parallel), sys.argv[1:])
    from nemo_vlm_ptq.ranks import run_rank

    return run_rank(command, plan, {key: value for key, _, value in options})


def _ranks_wanted(parallel: object) -> int:
    """Ranks of the recipe; data=auto takes all GPUs of this machine, and one without GPUs."""
    tensor, pipeline, data = parallel.tensor, parallel.pipeline, parallel.data  # type: ignore[attr-defined]
    if data == "auto":
        import torch

        data = max(1, torch.cuda.device_count() // (tensor * pipeline))
    return tensor * pipeline * data


def _start_ranks(count: int, words: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun's own account of a failure; ours names the cause in one line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    quiet = {
        PARENT: "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(threads),
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    os.environ.update({key: os.environ.get(key, value) for key, value in quiet.items()})
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
            elastic_launch(config, sys.executable)("-m", "nemo_vlm_ptq", *words)
        except ChildFailedError as error:
            return _explain(error)
        except SignalException as stop:
            print(f"nemo-vlm-ptq: stopped by {stop.sigval.name}", file=sys.stderr)
            return 128 + stop.sigval
    return 0


def _explain(error: ChildFailedError) -> int:
    """The cause of the first rank that failed, as this command's own failure."""
    rank, failure = error.get_first_failure()
    for other, candidate in sorted(error.failures.items()):
        if candidate.exitcode in (2, 3) and failure.exitcode not in (2, 3):
            rank, failure = other, candidate
    message = failure.message
    if isinstance(message, dict):
        message = message["message"]
    if failure.exitcode == 2:
        raise UserError(message) from None
    if failure.exitcode == 3:
        raise ProofError(message) from None
    print(f"nemo-vlm-ptq: rank {rank} failed, see its traceback above", file=sys.stderr)
    return 1


def wait_for_end(error: RuntimeError) -> None:
    """A rank whose peer has gone gives the launcher time to end it: the peer tells the reason."""
    if inside_ranks() and "by peer" in str(error):
        time.sleep(15)


def report_failure(message: str, code: int) -> None:
    """One line on stderr, or, on a rank that this command started, a note for the parent."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if inside_ranks() and path:
        extra = {"timestamp": str(int(time.time())), "exit_code": code}
        note = {"message": {"message": message, "extraInfo": extra}}
        Path(path).write_text(json.dumps(note))
    if not (inside_ranks() and PARENT in os.environ):
        sys.stderr.write(f"nemo-vlm-ptq: error: {message}\n")  # at once: ranks share the stream
