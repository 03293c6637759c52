"""Try in a process of its own what may take any time and memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path


def ends_within(action: Callable[[], object], seconds: int, extra_bytes: int) -> bool:
    """Return whether a function ends within limits, tried in a forked process.

    A process that has started ranks or uses a GPU must not call it.

    Args:
        action: the function; what it raises, MemoryError aside, is an end, too.
        seconds: CPU time that it may take.
        extra_bytes: memory that it may take beyond what this process has.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    code = 1
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        action()
        code = 0
    except MemoryError:
        pass
    except BaseException:
        code = 0
    finally:
        os._exit(code)
