"""A safetensors file that is written while its tensors are made.

The library wants all tensors of a file at once. Here room is left for the header, which comes
first, and filled in at the end: no more is held than what waits to be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
ENTRY = 256  # bytes of the header that a tensor may take
LENGTH = 8  # bytes that tell the header's


class TensorFile:
    """The file; a thread writes while the next tensors are made.

    Args:
        path: of the file.
        count: tensors that come, at most.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._room = ENTRY * (count + 1)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._file = path.open("wb")
        self._file.seek(LENGTH + self._room)
        self._writer = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors of the CPU; comes back when those given before have been written.

        Largest entries first, so that each begins at a multiple of the size of its own.
        """
        named = sorted(tensors.items(), key=lambda one: -one[1].element_size())
        if self._last is not None:
            self._last.result()
        self._last = self._writer.submit(self._write, named)

    def _write(self, named: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            assert self._end % tensor.element_size() == 0, f"{name} would begin between two entries"
            start, self._end = self._end, self._end + tensor.nbytes
            about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
            self._header[name] = about | {"data_offsets": [start, self._end]}
            every = tensor.detach().contiguous().view(-1)
            self._file.write(every.view(torch.uint8).numpy().data)

    def _finish(self) -> None:
        if self._last is not None:
            self._last.result()
        text = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(text) <= self._room, f"a header of {len(text)} bytes, room for {self._room}"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(LENGTH, "little") + text.ljust(self._room))

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The header is written if all went well."""
        try:
            if kind is None:
                self._finish()
        finally:
            self._writer.shutdown()
            self._file.close()
