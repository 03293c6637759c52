"""The command line: parse arguments, run one command, return one exit code.

Heavy packages are imported only once the command is known, so that --help is quick.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.constants import STAGE_GROUPS, STAGES
from nemo_vlm_ptq.errors import UserError, VerificationError, has_control_characters

USAGE = """\
nemo-vlm-ptq run       RECIPE [key=value ...]   all stages of the recipe; finished ones are skipped
nemo-vlm-ptq STAGE     RECIPE [key=value ...]   STAGE: import observe solve export verify build
                                                evaluate report
nemo-vlm-ptq calibrate RECIPE [key=value ...]   observe + solve
nemo-vlm-ptq plan      RECIPE [key=value ...]   check and forecast; reads no weights (--json: facts)
nemo-vlm-ptq status    WORKDIR [--json]         finished stages, Slurm jobs, the last error
nemo-vlm-ptq build     RECIPE --dry-run         print TensorRT-LLM's build commands; run nothing
nemo-vlm-ptq logits    RECIPE from=FORM inputs=FILE output=FILE [key=value ...]
                                                FORM: hf_source megatron quantized hf
                                                compressed_tensors trtllm nemo engine
nemo-vlm-ptq verify    RECIPE --again           verify exports that have passed before, too
nemo-vlm-ptq verify    DIR [--json]             check a TensorRT-LLM checkpoint of any writer
nemo-vlm-ptq families | formats [--json]        the support matrix

RECIPE is a YAML file or the name of a shipped recipe. Exit codes: 0 done, 1 a bug, 2 an error that
you can fix, 3 verification or a quality gate failed. --debug prints the traceback.
"""

LAUNCHED = {"NEMO_VLM_PTQ_PARENT", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE"}  # set for ranks


def entry() -> None:
    """Run `main` and end the process at once: destructors of a run take seconds."""
    interruptible = signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while these are imported: no traceback
    from nemo_vlm_ptq.distributed.launcher import report_stop, started_by_us, take_forks_along
    from nemo_vlm_ptq.utils.own_files import remove_own_files

    take_forks_along()
    if interruptible:
        own_pid = os.getpid()

        def stop_at_once(number: int, _: Any) -> None:  # an exception may get lost in imports
            is_told = started_by_us() or os.getpid() != own_pid  # by the parent
            remove_own_files()
            os._exit(128 + number if is_told else report_stop(number))

        signal.signal(signal.SIGINT, stop_at_once)
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Run the command line of `nemo-vlm-ptq` and `python -m nemo_vlm_ptq`."""
    if LAUNCHED & set(os.environ):
        from nemo_vlm_ptq.distributed.launcher import follow_launcher

        follow_launcher()
    _silence_packages()
    gc.disable()  # until the stages run: collections take a fifth of the import time of packages
    words = sys.argv[1:]
    if not words or words[0] == "help" or {"-h", "--help"} & set(words):
        print(USAGE, end="")
        sys.exit(0)
    if words[0] == "--version":
        from nemo_vlm_ptq import __version__

        print(f"nemo-vlm-ptq {__version__}")
        sys.exit(0)
    arguments = parse(words)
    try:
        sys.exit(_run(arguments))
    except (UserError, VerificationError) as error:
        if arguments.debug:
            traceback.print_exc()
        sys.exit(_report(error))
    except KeyboardInterrupt:
        from nemo_vlm_ptq.distributed.launcher import report_stop, started_by_us

        code = 128 + signal.SIGINT
        sys.exit(code if started_by_us() else report_stop(signal.SIGINT))
    except RuntimeError as error:
        from nemo_vlm_ptq.distributed.launcher import wait_for_launcher

        wait_for_launcher(error)
        raise


def _silence_packages() -> None:
    """Suppress warnings of packages that are for their own callers, unless the user asks for them.

    Also let torch's allocator grow its segments, so that freed memory serves tensors of any size.
    The ranks that this process starts inherit the environment.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")


def parse(words: list[str]) -> argparse.Namespace:
    """Parse command, recipe and overrides."""
    parser = argparse.ArgumentParser(prog="nemo-vlm-ptq", usage=USAGE, add_help=False)
    commands = ["run", *STAGES, *STAGE_GROUPS, "plan", "status", "logits", "families", "formats"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--again", action="store_true")
    return parser.parse_intermixed_args(words)


def _report(error: UserError | VerificationError) -> int:
    from nemo_vlm_ptq.distributed.launcher import report_failure

    code = 3 if isinstance(error, VerificationError) else 2
    report_failure(str(error), code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    command = arguments.command
    for word in (arguments.recipe or "", *arguments.overrides):
        if has_control_characters(word):
            raise UserError(f"{word!r} has control characters, such as line ends; remove them")
    if arguments.dry_run and command != "build":
        raise UserError("--dry-run is an option of build: build RECIPE --dry-run")
    if arguments.again and command != "verify":
        raise UserError("--again is an option of verify: verify RECIPE --again")
    if command in ("families", "formats"):
        from nemo_vlm_ptq.support_matrix import show_matrix

        print(show_matrix(command, as_json=arguments.json))
        return 0
    if arguments.recipe is None:
        needed = "a workdir" if command == "status" else "a recipe: a YAML file or a shipped name"
        raise UserError(f"{command} needs {needed}")
    if command == "status":
        _reject_overrides(arguments, "status WORKDIR")
        from nemo_vlm_ptq.workdir.status import format_status

        print(format_status(Path(arguments.recipe), as_json=arguments.json))
        return 0
    if command == "verify" and _names_checkpoint(arguments.recipe):
        _reject_overrides(arguments, "verify DIR")
        from nemo_vlm_ptq.targets.trtllm.verify_folder import verify_folder

        verify_folder(Path(arguments.recipe), as_json=arguments.json)
        return 0
    from nemo_vlm_ptq.commands import run_command

    return run_command(
        command,
        arguments.recipe,
        arguments.overrides,
        dry_run=arguments.dry_run,
        as_json=arguments.json and command == "plan",
        again=arguments.again,
    )


def _reject_overrides(arguments: argparse.Namespace, command: str) -> None:
    if arguments.overrides:
        raise UserError(f"{command} takes no recipe keys, got {arguments.overrides[0]!r}")


def _names_checkpoint(name: str) -> bool:
    """Return whether `verify NAME` means a folder; a shipped recipe of that name comes first."""
    folder = Path(name)
    if not folder.is_dir():
        return False
    from nemo_vlm_ptq.recipe import shipped_recipes
    from nemo_vlm_ptq.targets.trtllm.verify_folder import find_checkpoint

    return find_checkpoint(folder) is not None or name not in shipped_recipes()
