"""NeMo-Run recipes: each shipped recipe as a run.Partial, for any NeMo-Run executor.

    job = recipes.llava15_7b()
    job.recipe.quantize.format = "int4_awq"
    job.recipe.calibration.samples = 256
    run.run(job, executor=recipes.local_executor(ranks=2))

All settings come from configs/, so that there is one source of defaults. This module does not use
`from __future__ import annotations`, because NeMo-Run evaluates annotations.
"""

import contextlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nemo_vlm_ptq import cli
from nemo_vlm_ptq.constants import STAGE_GROUPS, STAGES
from nemo_vlm_ptq.distributed import launcher
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.recipe import Recipe, load_recipe, shipped_recipes
from nemo_vlm_ptq.recipe.loading import former_recipe

try:
    import fiddle
    import nemo_run as run
    import typer
except ImportError as error:
    raise ImportError(
        f"NeMo recipes require nemo_run ({error}); run: pip install 'nemo-vlm-ptq[run]'"
    ) from error

NAMESPACE = "vlm_ptq"  # nemorun vlm_ptq ptq ...
COMMANDS = ("run", "plan", *STAGES, *STAGE_GROUPS)
QUIET_ENV = {"PYTHONWARNINGS": "ignore", "LOGLEVEL": "WARNING"}
USAGE = f"""\
nemo-vlm-ptq-nemo RECIPE [recipe.KEY=VALUE ...] [command=COMMAND] [--dryrun] [--yes]
                         [run.executor=local|slurm] [run.executor.KEY=VALUE ...]
nemorun {NAMESPACE} ptq --factory RECIPE ...       equivalent
"""


class RecipeCliContext(run.cli.RunContext):
    """NeMo-Run CLI context that parses recipe.KEY=VALUE as nemo-vlm-ptq does.

    Invalid input ends the process with exit code 2 and one line on stderr, without a traceback.
    """

    def parse_fn(self, fn: Any, args: list[str], **_: Any) -> Any:
        """Parse command line arguments into a run.Partial."""
        recipe_args = [arg for arg in args if arg.startswith("recipe.")]
        task_args = [arg for arg in args if arg not in recipe_args]
        try:
            for arg in task_args:
                if arg.partition("=")[0] not in ("command", "folder"):
                    expected = "recipe.KEY=VALUE, command=COMMAND or folder=FOLDER"
                    raise UserError(f"unknown argument {arg!r}; expected {expected}")
            task = self._parse_task(fn, task_args)
            override(task, [arg.removeprefix("recipe.") for arg in recipe_args])
            _check_command(task.command, getattr(self.executor, "launcher", None) is not None)
        except UserError as error:
            _exit_with(error)
        self.plugins.append(self.experiment_plugin)
        return task

    def _parse_task(self, fn: Any, args: list[str]) -> Any:
        try:
            return super().parse_fn(fn, args)
        except ValueError:
            if isinstance(self.factory, str):
                load_recipe(self.factory)  # raises UserError that suggests similar names
            raise

    def parse_args(self, args: list[str], lazy: bool = False) -> Any:
        """Parse executor options; report an invalid one in one line instead of a traceback."""
        logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)
        try:
            return super().parse_args(args, lazy)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            message = re.split(r" exists for <| \(Argument|\n", str(cause))[0]
            _exit_with(UserError(f"run.executor: {message}; got {' '.join(args)}"))

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        """Run the task; exit with 1 if a local job failed, where NeMo-Run exits with 0."""
        self.experiment_plugin = run.Plugin()  # receives the experiment id
        super().cli_execute(fn, args, entrypoint_type)
        experiment_id = self.experiment_plugin.experiment_id
        if experiment_id and isinstance(self.executor, run.LocalExecutor):
            jobs = run.Experiment.from_id(experiment_id).status(return_dict=True) or {}
            if any(job["status"].name == "FAILED" for job in jobs.values()):
                raise SystemExit(1)


@run.cli.entrypoint(namespace=NAMESPACE, run_ctx_cls=RecipeCliContext)
def ptq(recipe: dict[str, Any], command: str = "run", folder: str = ".") -> None:
    """Run a nemo-vlm-ptq command on the executor's ranks, or start ranks if there are none.

    Args:
        recipe: the keys of a recipe.
        command: the command to run: run, plan, a stage, ...
        folder: the folder that relative paths in the recipe refer to.
    """
    argv = sys.argv
    try:
        _check_command(command, launcher.inside_ranks())
    except UserError as error:
        _exit_with(error)
    with contextlib.chdir(folder), _recipe_file(recipe) as file:
        sys.argv = ["nemo-vlm-ptq", command, str(file)]
        try:
            cli.main()
        except SystemExit as exit_:
            if exit_.code:
                raise
        finally:
            sys.argv = argv


def job(name: str) -> Any:
    """Create a run.Partial of ptq from a shipped recipe or a YAML file.

    Args:
        name: name of a factory or of a shipped recipe, or path of a YAML file.

    Raises:
        UserError: the recipe does not exist or is invalid.
    """
    return run.Partial(ptq, recipe=_to_config(load_recipe(name)), folder=os.getcwd())


def override(task: Any, overrides: Iterable[str]) -> None:
    """Apply KEY=VALUE overrides to the recipe of a run.Partial and validate the whole recipe.

    Raises:
        UserError: the recipe is missing or invalid.
    """
    if not hasattr(task, "recipe"):
        raise UserError("recipe is missing; name one with --factory, e.g. --factory quickstart")
    with _recipe_file(fiddle.build(task.recipe)) as file:
        task.recipe = _to_config(load_recipe(str(file), overrides))


def _check_command(command: str, has_ranks: bool) -> None:
    """Reject unknown commands, and `build` under a launcher that starts ranks."""
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; supported: {', '.join(COMMANDS)}")
    if command == "build" and has_ranks:
        raise UserError(
            "command 'build' must run in a single process but the launcher starts ranks; use an "
            "executor with launcher=None"
        )


def _to_config(values: Recipe | Mapping[str, Any]) -> Any:
    """Convert a recipe, including its defaults, to nested run.Config with settable attributes."""
    if isinstance(values, Recipe):
        values = values.model_dump(mode="json", by_alias=True)
    fields = {
        key: _to_config(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }
    return run.Config(recipe_section, **fields)


def recipe_section(**values: Any) -> dict[str, Any]:
    """Return the values as a dict; NeMo-Run 0.11 cannot copy a Config of dict itself."""
    return values


@contextlib.contextmanager
def _recipe_file(recipe: Mapping[str, Any]) -> Iterator[Path]:
    """Write a recipe to a temporary file that exists inside the context."""
    with tempfile.TemporaryDirectory(prefix="nemo-vlm-ptq-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(json.dumps(recipe, default=str, ensure_ascii=False))  # JSON is YAML
        yield file


def _exit_with(error: UserError) -> NoReturn:
    """Report an error in one line and exit with code 2."""
    launcher.report_failure(str(error), 2)
    raise SystemExit(2)


def _factory(name: str) -> Callable[[], Any]:
    """Create the factory of a shipped recipe and register it with NeMo-Run by name."""

    def make() -> run.Partial:
        return job(name)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"configs/{name}.yaml"
    return run.cli.factory(make, target=ptq)


FACTORIES = {name: _factory(name) for name in shipped_recipes()}


def __getattr__(name: str) -> Callable[[], Any]:
    """Return the factory of a shipped recipe, or of a former one named MODEL_FORMAT."""
    if name in FACTORIES:
        return FACTORIES[name]
    if former_recipe(name) is not None:
        return partial(job, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def local_executor(ranks: int = 1) -> Any:
    """Create an executor that starts ranks with torchrun on this machine."""
    return run.LocalExecutor(ntasks_per_node=ranks, launcher="torchrun", env_vars=dict(QUIET_ENV))


def slurm_executor(
    account: str | None,
    partition: str | None,
    nodes: int = 1,
    gpus_per_node: int = 8,
    image: str | None = None,
    time: str = "04:00:00",
    launcher: str | None = "torchrun",
) -> Any:
    """Create an executor for Slurm: one torchrun per node, one rank per GPU.

    The job is submitted from a machine of the cluster. The nodes must share the current folder; in
    a container it is mounted at the same path.

    Args:
        account: None for the default account; likewise partition.
        gpus_per_node: GPUs, and ranks, per node.
        image: container image; None runs without a container.
        time: time limit of the job.
        launcher: "torchrun", or None for the command `build`, which runs in a single process.
    """
    working_folder = os.getcwd()
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        job_name_prefix="vlm-ptq.",
        nodes=nodes,
        ntasks_per_node=gpus_per_node if launcher else 1,
        gpus_per_node=gpus_per_node,
        container_image=image,
        container_mounts=[f"{working_folder}:{working_folder}"],
        time=time,
        launcher=launcher,
        env_vars=dict(QUIET_ENV),
        additional_parameters={"kill_on_invalid_dep": "yes"},  # otherwise it stays pending forever
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),  # copies nothing: the package is installed on the nodes
    )


@run.cli.factory(name="local")
def _local() -> run.Config[run.LocalExecutor]:
    return local_executor().to_config()


@run.cli.factory(name="slurm")
def _slurm() -> run.Config[run.SlurmExecutor]:
    return slurm_executor(account=None, partition=None).to_config()


def main() -> None:
    """Run the command line interface nemo-vlm-ptq-nemo."""
    args = sys.argv[1:]
    if not args:
        print(USAGE, *FACTORIES, sep="\n")
        return
    if not args[0].startswith("-") and "=" not in args[0]:
        del sys.argv[1]
        ptq.cli_entrypoint.default_factory = lambda: job(args[0])
    app = typer.Typer(pretty_exceptions_enable=False)
    ptq.cli_entrypoint.cli(app)
    app()


if __name__ == "__main__":
    from nemo_vlm_ptq.nemo import recipes  # functions must belong to this module, not to __main__

    recipes.main()
