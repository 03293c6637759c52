"""Progress bars of rank 0, shown for work that takes more than a second.

In a log file a bar adds a line every 15 seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(description: str, unit: str, rank: int, items: Iterable[Any] | int) -> tqdm[Any]:
    """Return a progress bar that is disabled on all ranks but 0.

    Args:
        description: text in front of the bar.
        unit: what is counted, in the singular.
        rank: global rank.
        items: what the bar iterates over, or the total of a bar advanced by `update`.
    """
    total = items if isinstance(items, int) else None
    return tqdm(
        None if isinstance(items, int) else items,
        total=total,
        desc=description,
        unit=unit,
        disable=rank != 0,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        delay=1,
        leave=False,
    )
