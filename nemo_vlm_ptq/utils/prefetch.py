"""Prefetching: items are processed by background threads before the consumer requests them.

Reading and hashing files release the interpreter lock, so that they overlap with the consumer's
work. The number of results held in memory is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    items: Iterable[Item], function: Callable[[Item], Result], depth: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, in order, computing up to `depth` results in advance.

    Args:
        items: inputs of `function`.
        function: called once per item, in one of `depth` threads. What it raises is raised when
            the item's turn comes.
        depth: number of results computed while the consumer holds one.
    """
    with ThreadPoolExecutor(depth) as executor:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            pending.append((item, executor.submit(function, item)))
            if len(pending) > depth:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        for oldest, future in pending:
            yield oldest, future.result()


def prefetch_to_device(
    items: Iterable[Item], load: Callable[[Item], Result], device: torch.device
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the tensors that `load` returns, loading one item in advance.

    On a GPU `load` runs in a stream of its own, so that its copies overlap with computation. The
    consumer must have finished its GPU work on an item before it requests the next one.

    Args:
        items: inputs of `load`.
        load: reads the tensors of an item and copies them to the device.
        device: the device that `load` copies to.
    """
    import torch

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load_in_stream(item: Item) -> Result:
        with torch.cuda.stream(stream):  # a no-op if the stream is None
            result = load(item)
        if stream is not None:
            stream.synchronize()
        return result

    return prefetch(items, load_in_stream)
