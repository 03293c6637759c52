"""Commands in forked processes, with limits on time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_vlm_ptq import cli

GIBIBYTES = 4
LIMITS = {"seconds": 60.0}


def in_child(action: Callable[[], Any], seconds: float | None = None) -> tuple[Any, str]:
    """Run an action in a forked process with limits; return its result, or None and why."""
    seconds = seconds or LIMITS["seconds"]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (GIBIBYTES << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            result: Any = [action(), ""]
        except BaseException:
            result = [None, traceback.format_exc()]
        with open(write, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(write)
    with open(read) as file:
        said = file.read()
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hung = number == signal.SIGALRM
        return None, f"over {seconds} s" if hung else f"ended by signal {number}"
    if usage.ru_maxrss > GIBIBYTES << 20:
        return None, f"{usage.ru_maxrss >> 10} MiB of memory"
    result, reason = json.loads(said) if said else (None, f"ended with {status >> 8}")
    return result, reason


def command(words: list[str], log: Path) -> dict[str, Any]:
    """Run the command in this process; return its exit code, lines on stderr and any traceback."""
    os.environ["NO_COLOR"] = "1"
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    code, trace = None, ""
    sys.argv = ["nemo-vlm-ptq", *words]
    with (
        out.open("w") as stdout,
        err.open("w") as stderr,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            trace = traceback.format_exc()
    said = log.read_text(errors="replace") + err.read_text(errors="replace")
    return {"code": code, "err": said, "trace": trace, "modules": sorted(sys.modules)}
