"""NeMo recipes: every recipe that ships as a run.Partial, for any executor of nemo_run.

    job = recipes.llava15_7b_fp8()
    job.recipe.calibration.samples = 256
    run.run(job, executor=recipes.local_executor(ranks=2))

Settings come from configs/ alone. Annotations are no strings here, because nemo_run reads them.
"""

import contextlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from nemo_vlm_ptq import cli
from nemo_vlm_ptq import commands as launch
from nemo_vlm_ptq.constants import STAGE_GROUPS, STAGES
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.recipe import Recipe, load_recipe, shipped_recipes

try:
    import fiddle
    import nemo_run as run
    import typer
except ImportError as error:
    raise ImportError(
        f"NeMo recipes need nemo_run ({error}): pip install 'nemo-vlm-ptq[run]'"
    ) from error

NAMESPACE = "vlm_ptq"  # nemorun vlm_ptq ptq ...
COMMANDS = ("run", "plan", *STAGES, *STAGE_GROUPS)
PLAIN = "fp8"  # format of MODEL where no recipe of that name ships
QUIET = {"PYTHONWARNINGS": "ignore", "LOGLEVEL": "WARNING"}
USAGE = f"""\
nemo-vlm-ptq-nemo RECIPE [recipe.KEY=VALUE ...] [command=COMMAND] [--dryrun] [--yes]
                         [run.executor=local|slurm] [run.executor.KEY=VALUE ...]
nemorun {NAMESPACE} ptq --factory RECIPE ...       the same
"""


class Checked(run.cli.RunContext):
    """Reads recipe.KEY=VALUE as nemo-vlm-ptq does, and refuses what cannot work in one line."""

    def parse_fn(self, fn: Any, args: list[str], **_: Any) -> Any:
        """The Partial that the words of the command line describe."""
        own = [word for word in args if word.startswith("recipe.")]
        rest = [word for word in args if word not in own]
        try:
            for word in rest:
                if word.partition("=")[0] not in ("command", "folder"):
                    raise UserError(f"{word!r} is unknown; write recipe.KEY=VALUE, command=COMMAND")
            described = self._described(fn, rest)
            override(described, [word.removeprefix("recipe.") for word in own])
            _check_command(described.command, getattr(self.executor, "launcher", None) is not None)
        except UserError as error:
            _refuse(error)
        self.plugins.append(self.noted)
        return described

    def _described(self, fn: Any, args: list[str]) -> Any:
        try:
            return super().parse_fn(fn, args)
        except ValueError:
            if isinstance(self.factory, str):
                _load(self.factory)  # says what is like it
            raise

    def parse_args(self, args: list[str], lazy: bool = False) -> Any:
        """Options of the executor; nemo_run tells of a wrong one in a page."""
        logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)
        try:
            return super().parse_args(args, lazy)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            said = re.split(r" exists for <| \(Argument|\n", str(cause))[0]
            _refuse(UserError(f"run.executor: {said}; got {' '.join(args)}"))

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        """Run it; nemo_run itself ends with 0 also where the job failed."""
        self.noted = run.Plugin()  # is told the id of the experiment
        super().cli_execute(fn, args, entrypoint_type)
        name = self.noted.experiment_id
        if name and isinstance(self.executor, run.LocalExecutor):
            jobs = run.Experiment.from_id(name).status(return_dict=True) or {}
            if any(job["status"].name == "FAILED" for job in jobs.values()):
                raise SystemExit(1)


@run.cli.entrypoint(namespace=NAMESPACE, run_ctx_cls=Checked)
def ptq(recipe: dict[str, Any], command: str = "run", folder: str = ".") -> None:
    """Run a command of nemo-vlm-ptq, on the ranks that this is one of, or on ranks of its own.

    Args:
        recipe: the keys of a recipe.
        command: what to do with it: run, plan, a stage, ...
        folder: where relative paths of the recipe begin.
    """
    words = sys.argv
    try:
        _check_command(command, launch.inside_ranks())
    except UserError as error:
        _refuse(error)
    with contextlib.chdir(folder), _written(recipe) as file:
        sys.argv = ["nemo-vlm-ptq", command, str(file)]
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.argv = words


def job(name: str) -> Any:
    """What ptq is to do with a recipe: one that ships, or a YAML file.

    Raises:
        UserError: there is none, or it cannot work.
    """
    return run.Partial(ptq, recipe=_tree(_load(name)), folder=os.getcwd())


def override(described: Any, words: Iterable[str]) -> None:
    """Set keys of a job's recipe by key=value words, and check all of it.

    Raises:
        UserError: the recipe cannot work, or there is none.
    """
    if not hasattr(described, "recipe"):
        raise UserError("which recipe? name one with --factory, say --factory quickstart")
    with _written(fiddle.build(described.recipe)) as file:
        described.recipe = _tree(load_recipe(str(file), words))


def _check_command(command: str, ranks: bool) -> None:
    """Refuse a command that there is none, or that takes no ranks and would get some."""
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; known: {', '.join(COMMANDS)}")
    if command == "build" and ranks:
        raise UserError(
            "build runs in one process, and this executor's launcher starts ranks: give build one "
            "with launcher=None"
        )


def _load(name: str) -> Recipe:
    """The recipe that a factory's name means, or a file."""
    return load_recipe(_names().get(name, name))


def _names() -> dict[str, str]:
    """Name of a factory -> recipe that ships; MODEL is MODEL_fp8 where it is none itself."""
    shipped = shipped_recipes()
    ending = f"_{PLAIN}"
    plain = {name.removesuffix(ending): name for name in shipped if name.endswith(ending)}
    return plain | {name: name for name in shipped}


def _tree(values: Recipe | Mapping[str, Any]) -> Any:
    """Keys of a recipe, its defaults included, as nested configs with attributes to set."""
    if isinstance(values, Recipe):
        values = values.model_dump(mode="json", by_alias=True)
    parts = {key: _tree(part) if isinstance(part, dict) else part for key, part in values.items()}
    return run.Config(keys, **parts)


def keys(**values: Any) -> dict[str, Any]:
    """A group of keys of a recipe; nemo_run 0.11 cannot copy a Config of dict itself."""
    return values


@contextlib.contextmanager
def _written(recipe: Mapping[str, Any]) -> Iterator[Path]:
    """A recipe as a file, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="nemo-vlm-ptq-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(json.dumps(recipe, default=str, ensure_ascii=False))  # is YAML, too
        yield file


def _refuse(error: UserError) -> NoReturn:
    launch.report_failure(str(error), 2)
    raise SystemExit(2)


def _factory(name: str, shipped: str) -> Callable[[], Any]:
    """The factory of a recipe that ships, known to nemo_run by its name."""

    def make() -> run.Partial:
        return job(shipped)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"configs/{shipped}.yaml"
    return run.cli.factory(make, target=ptq)


FACTORIES = {name: _factory(name, shipped) for name, shipped in _names().items()}


def __getattr__(name: str) -> Callable[[], Any]:
    """recipes.NAME is the factory of that recipe."""
    if name not in FACTORIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return FACTORIES[name]


def local_executor(ranks: int = 1) -> Any:
    """Ranks of torchrun on this machine."""
    return run.LocalExecutor(ntasks_per_node=ranks, launcher="torchrun", env_vars=dict(QUIET))


def slurm_executor(
    account: str | None,
    partition: str | None,
    nodes: int = 1,
    gpus_per_node: int = 8,
    image: str | None = None,
    time: str = "04:00:00",
    launcher: str | None = "torchrun",
) -> Any:
    """A job on Slurm, submitted from a machine of the cluster: torchrun once a node, a rank a GPU.

    The current folder has to be there, too; in a container it is mounted at its own path.
    launcher: None for build, which runs in one process.
    """
    here = os.getcwd()
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        job_name_prefix="vlm-ptq.",
        nodes=nodes,
        ntasks_per_node=gpus_per_node if launcher else 1,
        gpus_per_node=gpus_per_node,
        container_image=image,
        container_mounts=[f"{here}:{here}"],
        time=time,
        launcher=launcher,
        env_vars=dict(QUIET),
        additional_parameters={"kill_on_invalid_dep": "yes"},  # else it waits for ever
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),  # the package is installed there; nothing has to be copied
    )


@run.cli.factory(name="local")
def _local() -> run.Config[run.LocalExecutor]:
    return local_executor().to_config()


@run.cli.factory(name="slurm")
def _slurm() -> run.Config[run.SlurmExecutor]:
    return slurm_executor(account=None, partition=None).to_config()


def main() -> None:
    """Entry point of nemo-vlm-ptq-nemo."""
    words = sys.argv[1:]
    if not words:
        print(USAGE, *FACTORIES, sep="\n")
        return
    if not words[0].startswith("-") and "=" not in words[0]:
        del sys.argv[1]
        ptq.cli_entrypoint.default_factory = lambda: job(words[0])
    app = typer.Typer(pretty_exceptions_enable=False)
    ptq.cli_entrypoint.cli(app)
    app()


if __name__ == "__main__":
    from nemo_vlm_ptq.nemo import recipes  # functions are to be of this module, not of __main__

    recipes.main()
