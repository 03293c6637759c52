"""Files that end with this process, also if Ctrl-C ends it at once."""

import contextlib
import os
from pathlib import Path

_files: set[Path] = set()
os.register_at_fork(after_in_child=_files.clear)


def own(path: Path) -> None:
    """Have `remove_own_files` remove a file."""
    _files.add(path)


def remove_own(path: Path) -> None:
    """Remove a file; it may be gone already, and its folder, too."""
    _files.discard(path)
    with contextlib.suppress(OSError):
        path.unlink()


def remove_own_files() -> None:
    """Remove the files of this process."""
    for path in list(_files):
        remove_own(path)
