"""Reading ahead: the next layer is read while this one is worked on, by one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from nemo_vlm_ptq.utils.prefetch import prefetch

Item = TypeVar("Item")
Read = TypeVar("Read")


def prefetch_to_device(
    items: Iterable[Item], read: Callable[[Item], Read], device: torch.device
) -> Iterator[tuple[Item, Read]]:
    """Items and what `read` gives of each, one item ahead of whoever asks.

    On a GPU copies run beside the work, on a stream of their own. The one who asks must be through
    with what he was given, on the GPU as well, before he asks again.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def aside(item: Item) -> Read:
        with torch.cuda.stream(stream):  # None: the stream as it is
            result = read(item)
        if stream is not None:
            stream.synchronize()
        return result

    return prefetch(items, aside)
