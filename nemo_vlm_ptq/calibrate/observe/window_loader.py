"""Build windows of layers in a thread, one ahead of the window that computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class WindowLoader:
    """Iterator over built windows that holds at most one beside the caller's.

    On a GPU windows are built in a stream of their own, so that their copies overlap with
    computation. The caller must drop a window before it takes the next one.

    Args:
        build: layers -> window.
        windows: in order.
        device: device of the windows.
    """

    def __init__(
        self, build: Callable[[range], Any], windows: Iterable[range], device: torch.device
    ) -> None:
        windows = list(windows)
        self._last = windows[-1].stop if windows else 0
        self._build, self._windows, self._device = build, iter(windows), device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._executor = ThreadPoolExecutor(1)
        self._next: Future[Any] | None = None
        self._submit()

    def __enter__(self) -> WindowLoader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._executor.shutdown(cancel_futures=True)
        self._next = None

    def take(self) -> Any:
        """Return the next window, and start to build the one after it."""
        assert self._next is not None, "no window is left"
        if self._stream is not None:  # memory of the window before may be given to the next
            torch.cuda.current_stream(self._device).synchronize()
        window = self._next.result()
        self._next = None
        self._submit()
        return window

    def _submit(self) -> None:
        window = next(self._windows, None)
        if window is not None:
            self._next = self._executor.submit(self._load, window)

    def _load(self, window: range) -> Any:
        with torch.cuda.stream(self._stream):  # no effect for None
            model = self._build(window)
        if self._stream is not None:
            self._stream.synchronize()
            if window.stop == self._last:  # what loading has used; it serves no other stream
                torch.cuda.empty_cache()
        return model
