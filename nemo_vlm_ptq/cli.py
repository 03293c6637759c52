"""The command: one line of words in, one stage or all of them, one exit code out.

Heavy packages are imported only once it is known what to do, so that --help is quick.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import traceback
from pathlib import Path

from nemo_vlm_ptq.constants import STAGE_GROUPS, STAGES
from nemo_vlm_ptq.errors import UserError, VerificationError

USAGE = """\
nemo-vlm-ptq run       RECIPE [key=value ...]   all stages of the recipe; finished ones are skipped
nemo-vlm-ptq STAGE     RECIPE [key=value ...]   STAGE: import observe solve export verify build
                                                evaluate report
nemo-vlm-ptq calibrate RECIPE [key=value ...]   observe + solve
nemo-vlm-ptq plan      RECIPE [key=value ...]   check and forecast; reads no weights (--json: facts)
nemo-vlm-ptq status    WORKDIR [--json]         stages done and not, jobs in Slurm, the last error
nemo-vlm-ptq build     RECIPE --dry-run         print what TensorRT-LLM is to be told; run nothing
nemo-vlm-ptq logits    RECIPE from=FORM inputs=FILE output=FILE [key=value ...]
                                                FORM: hf_source megatron quantized trtllm hf
                                                compressed_tensors nemo engine
nemo-vlm-ptq verify    DIR [--json]             check a TensorRT-LLM checkpoint, whoever wrote it
nemo-vlm-ptq families | formats [--json]        what is supported

RECIPE is a YAML file or the name of one that ships. Exit codes: 0 done, 2 you can fix it,
3 verification or a gate failed, 1 a bug of ours. --debug shows the traceback.
"""


def parse(words: list[str]) -> argparse.Namespace:
    """Command, recipe and overrides."""
    parser = argparse.ArgumentParser(prog="nemo-vlm-ptq", usage=USAGE, add_help=False)
    commands = ["run", *STAGES, *STAGE_GROUPS, "plan", "status", "logits", "families", "formats"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_intermixed_args(words)


def main() -> None:
    """Entry point of `nemo-vlm-ptq` and `python -m nemo_vlm_ptq`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for its own loaders
    gc.disable()  # until a rank works: looking for garbage is a fifth of the time packages take
    words = sys.argv[1:]
    if not words or words[0] == "help" or {"-h", "--help"} & set(words):
        print(USAGE, end="")
        sys.exit(0)
    if words[0] == "--version":
        from nemo_vlm_ptq import __version__

        print(f"nemo-vlm-ptq {__version__}")
        sys.exit(0)
    chosen = parse(words)
    try:
        sys.exit(_dispatch(chosen))
    except (UserError, VerificationError) as error:
        if chosen.debug:
            traceback.print_exc()
        sys.exit(_refuse(error))
    except KeyboardInterrupt:  # the command that started ranks says so
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        from nemo_vlm_ptq import commands as launch

        launch.wait_for_end(error)
        raise


def _refuse(error: UserError | VerificationError) -> int:
    from nemo_vlm_ptq import commands as launch

    code = 3 if isinstance(error, VerificationError) else 2
    launch.report_failure(str(error), code)
    return code


def _dispatch(chosen: argparse.Namespace) -> int:
    if chosen.dry_run and chosen.command != "build":
        raise UserError("--dry-run is an option of build; write build RECIPE --dry-run")
    if chosen.command in ("families", "formats"):
        from nemo_vlm_ptq.support_matrix import show_matrix

        print(show_matrix(chosen.command, as_json=chosen.json))
        return 0
    if chosen.recipe is None:
        what = (
            "a workdir"
            if chosen.command == "status"
            else "a recipe: a YAML file or a name that ships"
        )
        raise UserError(f"{chosen.command} needs {what}")
    if chosen.command == "verify" and Path(chosen.recipe).is_dir() and _verify_folder(chosen):
        return 0
    if chosen.command == "status":
        from nemo_vlm_ptq.workdir.status import show_status

        if chosen.overrides:
            raise UserError(f"status WORKDIR takes no recipe keys, got {chosen.overrides[0]!r}")
        print(show_status(Path(chosen.recipe), as_json=chosen.json))
        return 0
    from nemo_vlm_ptq import commands as launch

    return launch.run_command(
        chosen.command,
        chosen.recipe,
        chosen.overrides,
        dry_run=chosen.dry_run,
        as_json=chosen.json and chosen.command == "plan",
    )


def _verify_folder(chosen: argparse.Namespace) -> bool:
    """Check a checkpoint by itself; False where a recipe is meant that is called like a folder."""
    from nemo_vlm_ptq.recipe import shipped_recipes
    from nemo_vlm_ptq.targets.trtllm.verify_folder import find_checkpoint, verify_folder

    folder = Path(chosen.recipe)
    if find_checkpoint(folder) is None and chosen.recipe in shipped_recipes():
        return False
    if chosen.overrides:
        raise UserError(f"verify DIR takes no recipe keys, got {chosen.overrides[0]!r}")
    verify_folder(folder, as_json=chosen.json)
    return True
