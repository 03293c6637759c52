"""One kind of progress bar, on one rank; in a log file it writes a line now and then.

What is over within a second shows none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(what: str, unit: str, rank: int, items: Iterable[Any] | int) -> tqdm[Any]:
    """A bar over items, or one of a length to be moved by hand; silent on ranks other than 0."""
    length = items if isinstance(items, int) else None
    return tqdm(
        None if isinstance(items, int) else items,
        total=length,
        desc=what,
        unit=unit,
        disable=rank != 0,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        delay=1,
        leave=False,
    )
