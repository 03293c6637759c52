"""Start ranks on this machine, pass signals on to them, and end them together.

torchrun's agent listens on all addresses of the machine, and unpickles what it gets there. Ranks
that this module starts listen on one: the loopback address if there is one machine, else the
address of machine 0 that the user names. The ranks die with this process, however it ends.

`python -m nemo_vlm_ptq.distributed.spawn COUNT NODES NODE ADDRESS PORT ARGUMENT ...` starts COUNT
ranks of `nemo-vlm-ptq ARGUMENT ...`; launch/run.sh calls it on every machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_vlm_ptq.distributed import launcher
from nemo_vlm_ptq.errors import UserError, VerificationError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LOOPBACK = "127.0.0.1"
FORWARDED = (signal.SIGINT, *launcher.STOP_SIGNALS)
POLL_SECONDS = 0.1
SAVE_SECONDS = 75.0  # for ranks to save their progress after a signal; Slurm's kill comes after 90
INTERRUPT_SECONDS = 3.0  # for ranks to end after Ctrl-C, which saves nothing
LOST_PEER_SECONDS = 2.0  # a rank that failed first may end after one that lost it as a peer
END_SECONDS = 10.0  # for the other ranks to end after one has failed


@dataclass(frozen=True)
class Machines:
    """Machines of a run, and which of them this is.

    address: of machine 0, for its rank 0 to listen on; port: 0 for any free one.
    """

    count: int = 1
    index: int = 0
    address: str = LOOPBACK
    port: int = 0


def run_ranks(
    arguments: Sequence[str], count: int, machines: Machines = Machines()
) -> dict[int, ProcessFailure]:
    """Run `python -m nemo_vlm_ptq ARGUMENTS` on `count` ranks of this machine, to their end.

    Returns:
        global rank -> how it failed, with what it wrote about it; empty if none did.

    Raises:
        launcher.Stopped: a signal stopped the ranks.
        UserError: the address is not one of this machine, or its port is in use.
    """
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="nemo-vlm-ptq-") as folder, _collected(received):
        ranks = _start(arguments, count, machines, Path(folder))
        try:
            _wait(ranks, received)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if received:
            raise launcher.Stopped(received[0])
        if not any(rank.returncode for rank in ranks):
            return {}
        return _failures(ranks, machines, Path(folder))


@contextmanager
def _collected(received: list[int]) -> Iterator[None]:
    """Collect signals instead of being ended by them, but for those that are ignored anyway."""
    handled = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in handled
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    arguments: Sequence[str], count: int, machines: Machines, folder: Path
) -> list[subprocess.Popen[bytes]]:
    """Start the ranks; rank 0 inherits the socket that it listens on for all others."""
    listener = open_listener(machines.address, machines.port) if machines.index == 0 else None
    port = machines.port if listener is None else listener.getsockname()[1]
    cores = len(os.sched_getaffinity(0))
    common = {
        launcher.PARENT_VARIABLE: str(os.getpid()),
        "WORLD_SIZE": str(count * machines.count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": machines.address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
    }
    if machines.count == 1:
        common |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    ranks = []
    for local in range(count):
        rank = machines.index * count + local
        descriptor = str(listener.fileno()) if listener is not None and rank == 0 else ""
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            launcher.STORE_VARIABLE: descriptor,
            "TORCHELASTIC_ERROR_FILE": str(_error_file(folder, local)),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "nemo_vlm_ptq", *arguments],
                env=os.environ | common | own,
                pass_fds=[int(descriptor)] if descriptor else [],
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone
            )
        )
    if listener is not None:
        listener.close()
    return ranks


def open_listener(address: str, port: int) -> socket.socket:
    """Return a socket that listens on one address of this machine.

    Raises:
        UserError: the address is not one of this machine, or the port is in use.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        return socket.create_server(place[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: this machine cannot listen there "
            f"({reason}); machine 0 needs an address of its own and a free port"
        ) from None


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """Wait until all ranks have ended; end them after a failure or a signal."""
    forwarded, deadline, end_at = 0, float("inf"), float("inf")
    while None in [rank.poll() for rank in ranks]:  # a list: every rank is polled
        now = time.monotonic()
        for number in received[forwarded:]:
            _send(ranks, number)
            seconds = INTERRUPT_SECONDS if number == signal.SIGINT else SAVE_SECONDS
            deadline = min(deadline, now + seconds)
        forwarded = len(received)
        if end_at == float("inf") and any(rank.returncode for rank in ranks):
            end_at = now + (0.0 if received else LOST_PEER_SECONDS)
        if now >= end_at and deadline == float("inf"):
            _send(ranks, signal.SIGTERM)
            deadline = now + END_SECONDS
        if now >= deadline or len(received) > 2:
            return
        time.sleep(POLL_SECONDS)


def _send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # nothing if it has ended


def _failures(
    ranks: Sequence[subprocess.Popen[bytes]], machines: Machines, folder: Path
) -> dict[int, ProcessFailure]:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    return {
        machines.index * len(ranks) + local: ProcessFailure(
            local_rank=local,
            pid=rank.pid,
            exitcode=rank.returncode,
            error_file=str(_error_file(folder, local)),
        )
        for local, rank in enumerate(ranks)
        if rank.returncode
    }


def _error_file(folder: Path, local: int) -> Path:
    return folder / f"error{local}.json"


def main(words: Sequence[str]) -> int:
    """Start the ranks of launch/run.sh, and return the exit code of the command."""
    count, nodes, node, address, port, *arguments = words
    machines = Machines(int(nodes), int(node), address or LOOPBACK, int(port))
    code, message = 0, ""
    try:
        if failures := run_ranks(arguments, int(count), machines):
            code = launcher.explain_failure(failures, None)
    except UserError as reason:
        code, message = 2, str(reason)
    except VerificationError as reason:
        code, message = 3, str(reason)
    except launcher.Stopped as stop:
        code = launcher.report_stop(stop.number)
    if message:
        launcher.report_failure(message, code)
    return code


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ranks run: no traceback
    sys.exit(main(sys.argv[1:]))
