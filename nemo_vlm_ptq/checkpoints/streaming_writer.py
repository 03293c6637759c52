"""A safetensors file that is written while its tensors are made.

The library wants all tensors of a file at once. Here room is left for the header, which comes
first, and filled in at the end: no more is held than what waits to be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip
ENTRY = 256  # bytes of the header that a tensor may take
UNIT = 8  # bytes of the largest entry
LENGTH = 8  # bytes that tell the header's

Add = Callable[[Mapping[str, torch.Tensor]], None]


@contextmanager
def tensor_file(path: Path, count: int) -> Iterator[Add]:
    """What takes tensors of the CPU; a thread writes them while the next ones are made.

    It comes back when those given before have been written. Every tensor begins at a multiple of
    its entries' size: those whose bytes are no multiple of 8, most of them of one entry, are kept
    for the end of the file. Where the block fails, the header is missing.

    Args:
        path: of the file.
        count: tensors that come, at most.
    """
    room, end = ENTRY * (count + 1), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    last: list[Future[None]] = []
    odd: dict[str, torch.Tensor] = {}

    def write(named: Iterable[tuple[str, torch.Tensor]]) -> None:
        nonlocal end
        for name, tensor in named:
            start, end = end, end + tensor.nbytes
            about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
            header[name] = about | {"data_offsets": [start, end]}
            every = tensor.detach().contiguous().view(-1)
            file.write(every.view(torch.uint8).numpy().data)

    def wait() -> None:
        while last:
            last.pop().result()

    def add(tensors: Mapping[str, torch.Tensor]) -> None:
        wait()
        odd.update({name: tensor for name, tensor in tensors.items() if tensor.nbytes % UNIT})
        last.append(writer.submit(write, [one for one in tensors.items() if one[0] not in odd]))

    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        file.seek(LENGTH + room)
        yield add
        wait()
        write(sorted(odd.items(), key=lambda one: -one[1].element_size()))
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= room, f"a header of {len(text)} bytes, room for {room}"
        file.seek(0)
        file.write(room.to_bytes(LENGTH, "little") + text.ljust(room))
