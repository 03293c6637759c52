"""Start ranks on this machine, or run one here; report why one failed."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.utils.own_files import remove_own_files
from nemo_vlm_ptq.workdir.store import in_progress_marker

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STORE_VARIABLE = "NEMO_VLM_PTQ_STORE"  # file descriptor that rank 0 listens on; empty: none
PLANNED_VARIABLE = "NEMO_VLM_PTQ_PLANNED"  # set for ranks of a command that has planned the run
PARENT_VARIABLE = "NEMO_VLM_PTQ_PARENT"  # pid of this package's process that started a rank
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal stopped the ranks that this process started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def inside_ranks() -> bool:
    """Return whether a launcher has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def started_by_us() -> bool:
    """Return whether a process of this package started this rank, and reports its failure."""
    return PARENT_VARIABLE in os.environ


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def take_forks_along() -> None:
    """Have what the main thread forks from now on, such as megatron-core's writers, die with it."""
    main = threading.get_ident()

    def follow() -> None:
        if threading.get_ident() == main:  # the end of another thread would kill it, too
            die_with_parent()

    os.register_at_fork(after_in_child=follow)


def follow_launcher() -> None:
    """End this rank with the process that started it, which may have ended already."""
    die_with_parent()
    if started_by_us() and os.environ[PARENT_VARIABLE] != str(os.getppid()):
        os._exit(128 + signal.SIGKILL)


def planned_by_parent() -> bool:
    """Return whether a command has planned this run, owns the workdir, and started this rank."""
    return PLANNED_VARIABLE in os.environ


def start_ranks(count: int, arguments: Sequence[str], workdir: Path) -> int:
    """Run `python -m nemo_vlm_ptq ARGUMENTS` on `count` ranks of this machine.

    Args:
        count: number of ranks.
        arguments: command line arguments of every rank.
        workdir: searched for the folder that a failing rank was writing.

    Returns:
        The exit code.

    Raises:
        UserError: a rank ended with exit code 2.
        VerificationError: a rank ended with exit code 3.
    """
    from nemo_vlm_ptq.distributed.spawn import run_ranks

    os.environ[PLANNED_VARIABLE] = "1"
    before = folders_in_progress(workdir)
    try:
        failures = run_ranks(arguments, count)
    except Stopped as stop:
        return report_stop(stop.number)
    finally:
        del os.environ[PLANNED_VARIABLE]
    if not failures:
        return 0
    return explain_failure(failures, _folder_in_progress(workdir, before))


def run_here(work: Callable[[], int], workdir: Path) -> int:
    """Run the only rank in this process, and report its end like that of a started rank.

    Args:
        work: returns the exit code.
        workdir: searched for the folder that was being written when `work` failed.

    Returns:
        The exit code.
    """
    before = folders_in_progress(workdir)
    try:
        with _ended_by_stop_signals():
            return work()
    except (UserError, VerificationError):
        raise
    except Exception as error:
        traceback.print_exc()
        cause = f"failed: {first_line(error)}"
        return _report_rank(0, cause, _folder_in_progress(workdir, before))


@contextmanager
def _ended_by_stop_signals() -> Iterator[None]:
    """End the process with one line on the first of STOP_SIGNALS.

    An exception would get lost in a finalizer, or in an `except:` of a package. Signals that the
    parent process had ignored, as nohup does, stay ignored.
    """

    def stop(number: int, _: Any) -> NoReturn:
        remove_own_files()
        with suppress(RuntimeError):  # the signal came while stdout was being written
            sys.stdout.flush()
        os._exit(report_stop(number))

    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report_stop(number: int) -> int:
    """Print which signal stopped the command, and return the exit code."""
    print(f"nemo-vlm-ptq: stopped by {signal.Signals(number).name}", file=sys.stderr)
    return 128 + number


def _folder_in_progress(workdir: Path, before: Mapping[Path, int]) -> Path | None:
    """Return the unfinished stage folder that was started last since `before`, if any."""
    started = folders_in_progress(workdir).items() - before.items()
    folders = [folder for folder, _ in sorted(started, key=lambda item: item[1])]
    return folders[-1] if folders else None


def folders_in_progress(workdir: Path) -> dict[Path, int]:
    """Return the unfinished stage folders with the time at which each was started, in ns."""
    name = in_progress_marker(workdir / "*").name
    prefix, suffix = name.split("*")
    found = {}
    with suppress(OSError):  # the workdir may be gone
        for path in (*workdir.glob(name), *workdir.glob(f"*/{name}")):
            folder = path.with_name(path.name.removeprefix(prefix).removesuffix(suffix))
            found[folder] = path.stat().st_mtime_ns
    return found


def explain_failure(failures: Mapping[int, ProcessFailure], folder: Path | None) -> int:
    """Report the most informative failure of a rank as this command's own.

    Ranks that lost a peer may fail within the same second as the peer. SIGTERM is least
    informative: the launcher sends it to the remaining ranks.
    """
    rank, failure = min(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    for other, candidate in sorted(failures.items()):
        if _informativeness(candidate) > _informativeness(failure) and (
            candidate.exitcode in (2, 3) or candidate.timestamp == failure.timestamp
        ):
            rank, failure = other, candidate
    note: Any = failure.message  # torch's stub declares str
    message = f"exit code {failure.exitcode}, see above"
    if isinstance(note, dict):
        message = note["message"]
    if failure.exitcode == 2:
        raise UserError(message) from None
    if failure.exitcode == 3:
        raise VerificationError(message) from None
    if failure.exitcode < 0:
        hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        cause = f"was ended by signal {failure.signal_name()}{hint}"
    else:
        cause = f"failed: {message}"
    return _report_rank(rank, cause, folder)


def _report_rank(rank: int, cause: str, folder: Path | None) -> int:
    """Print how a rank ended, and return the exit code of a bug."""
    place = f" while {folder} was being written" if folder else ""
    print(f"nemo-vlm-ptq: error: rank {rank} {cause}{place}", file=sys.stderr)
    return 1


def first_line(error: Exception) -> str:
    """Return the type and the first line of an unexpected error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _informativeness(failure: ProcessFailure) -> int:
    """Rank how much the end of a rank says about the cause."""
    if failure.exitcode in (2, 3):
        return 3
    if failure.exitcode == -signal.SIGTERM:
        return 0
    return 2 if failure.exitcode < 0 or isinstance(failure.message, dict) else 1


def lost_peer(error: Exception) -> bool:
    """Return whether an error only says that another rank ended."""
    words = ("by peer", "remote worker crashing")  # of gloo
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def wait_for_launcher(error: RuntimeError) -> None:
    """Give the launcher time to end a rank whose peer ended: the peer reports the cause."""
    if inside_ranks() and lost_peer(error):
        time.sleep(15)


def report_failure(message: str, code: int) -> None:
    """Print one line on stderr; ranks started by this command leave it to the parent process."""
    write_error_file(message, code)
    if not (inside_ranks() and started_by_us()):
        sys.stderr.write(f"nemo-vlm-ptq: error: {message}\n")  # one write: ranks share the stream


def write_error_file(message: str, code: int) -> None:
    """Write why this rank ends to torchrun's error file, which the launcher prints."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if inside_ranks() and path:
        extra = {"timestamp": str(int(time.time())), "exit_code": code}
        note = {"message": {"message": message, "extraInfo": extra}}
        Path(path).write_text(json.dumps(note))
