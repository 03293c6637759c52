"""Writer of a safetensors file that takes tensors while later ones are still being computed.

`safetensors.torch.save_file` needs all tensors of the file at once. Here the space of the header,
which precedes the tensors, is reserved and filled in last, so that only the tensors of the pending
write are held in memory. The cost is an upper bound on the number of tensors, and some padding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip
HEADER_BYTES_PER_TENSOR = 256
ALIGNMENT = 8  # bytes; the size of the largest element
LENGTH_BYTES = 8  # of the integer that states the header's length

AddTensors = Callable[[Mapping[str, torch.Tensor]], None]


@contextmanager
def open_streaming_writer(path: Path, max_tensors: int) -> Iterator[AddTensors]:
    """Open a safetensors file and yield a function that adds CPU tensors to it.

    A thread writes the added tensors. Each call first waits until the previous ones are written.
    Every tensor starts at a multiple of its element size: tensors whose size is no multiple of 8
    bytes, most of them scalars, are written last. If the block raises, the file has no header.

    Args:
        path: of the file.
        max_tensors: upper bound on the number of tensors.

    Raises:
        AssertionError: the header does not fit, because of more tensors or long names.
    """
    header_size, end = HEADER_BYTES_PER_TENSOR * (max_tensors + 1), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pending: list[Future[None]] = []
    unaligned: dict[str, torch.Tensor] = {}

    def write(named: Iterable[tuple[str, torch.Tensor]]) -> None:
        nonlocal end
        for name, tensor in named:
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            flat = tensor.detach().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data)

    def wait() -> None:
        while pending:
            pending.pop().result()

    def add(tensors: Mapping[str, torch.Tensor]) -> None:
        wait()
        unaligned.update({name: t for name, t in tensors.items() if t.nbytes % ALIGNMENT})
        aligned = [(name, t) for name, t in tensors.items() if name not in unaligned]
        pending.append(executor.submit(write, aligned))

    with path.open("wb") as file, ThreadPoolExecutor(1) as executor:
        file.seek(LENGTH_BYTES + header_size)
        yield add
        wait()
        write(sorted(unaligned.items(), key=lambda item: -item[1].element_size()))
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= header_size, f"header of {len(text)} bytes, {header_size} reserved"
        file.seek(0)
        file.write(header_size.to_bytes(LENGTH_BYTES, "little") + text.ljust(header_size))
