"""Work done ahead of whoever asks for it, by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(
    items: Iterable[Item], make: Callable[[Item], Made], count: int = 1
) -> Iterator[tuple[Item, Made]]:
    """Items in order and what `make` gives of each; `count` are made while one is worked on."""
    with ThreadPoolExecutor(count) as threads:
        waiting: deque[tuple[Item, Future[Made]]] = deque()
        for item in items:
            waiting.append((item, threads.submit(make, item)))
            if len(waiting) > count:
                before, made = waiting.popleft()
                yield before, made.result()
        for before, made in waiting:
            yield before, made.result()
