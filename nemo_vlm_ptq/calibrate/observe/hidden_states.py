"""Hidden states of a rank's micro-batches between two windows of layers.

They stand on the device while there is room, else in host memory, pinned for a GPU, else in a file.
A micro-batch keeps its place: behind every window its states replace those in front of it.

Legend: S tokens, B samples, H hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from nemo_vlm_ptq.utils.own_files import own, remove_own
from nemo_vlm_ptq.utils.pinned_memory import to_device

HOST_RESERVE_BYTES = 4 << 30  # of host memory that stays free for everything else


class HiddenStates:
    """Store of one tensor [S,B,H] per micro-batch.

    Args:
        device: of the tensors that are taken out.
        device_bytes: bytes of it that may be used.
        host_bytes: bytes of host memory that may be used after that.
        path: file for the others; created when it is needed.
    """

    def __init__(
        self, device: torch.device, device_bytes: int, host_bytes: int, path: Path
    ) -> None:
        self._device, self._path = device, path
        self._device_room = device_bytes
        self._host_room = host_bytes
        self._in_memory: dict[int, torch.Tensor] = {}
        self._in_file: dict[int, tuple[int, torch.Tensor]] = {}  # offset, tensor without data
        self._descriptor: int | None = None
        self._end = 0

    def put(self, index: int, states: torch.Tensor) -> None:
        """Store the states of a micro-batch, in the place of earlier ones of the same shape."""
        if index in self._in_memory:
            self._in_memory[index].copy_(states, non_blocking=True)
        elif index in self._in_file:
            self._write(self._in_file[index][0], states)
        elif states.nbytes <= self._device_room:
            self._device_room -= states.nbytes
            self._in_memory[index] = states.clone()
        elif states.nbytes <= self._host_room:
            self._host_room -= states.nbytes
            host = torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda)
            self._in_memory[index] = host.copy_(states, non_blocking=True)
        else:
            self._in_file[index] = self._end, states.new_empty(states.shape, device="meta")
            self._write(self._end, states)
            self._end += states.nbytes

    def get(self, index: int) -> torch.Tensor:
        """Return the states of a micro-batch on the device."""
        if index in self._in_memory:
            return self._in_memory[index].to(self._device, non_blocking=True)
        offset, like = self._in_file[index]
        assert self._descriptor is not None
        host = torch.empty(like.shape, dtype=like.dtype)
        buffer = _bytes_of(host)
        while len(buffer):
            read = os.preadv(self._descriptor, [buffer], offset)
            if not read:
                raise RuntimeError(f"{self._path} was truncated while it was in use")
            buffer, offset = buffer[read:], offset + read
        return to_device(host, self._device)

    def _write(self, offset: int, states: torch.Tensor) -> None:
        if self._descriptor is None:
            own(self._path)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        host = states.detach().contiguous().cpu()
        buffer = _bytes_of(host)
        while len(buffer):
            written = os.pwrite(self._descriptor, buffer, offset)
            buffer, offset = buffer[written:], offset + written

    def close(self) -> None:
        """Free the memory and remove the file."""
        self._in_memory.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            remove_own(self._path)
            self._descriptor = None


def _bytes_of(host: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return host.view(-1).view(torch.uint8).numpy().data


def host_room(device: torch.device, local_ranks: int) -> int:
    """Return the bytes of host memory that a rank's hidden states may take beside its device's."""
    if device.type == "cpu":
        return 0  # the host is the device
    available = int(psutil.virtual_memory().available) - HOST_RESERVE_BYTES
    return max(0, available // local_ranks)


@contextmanager
def open_hidden_states(
    device: torch.device, device_bytes: int, host_bytes: int, path: Path
) -> Iterator[HiddenStates]:
    """Open a store; see `HiddenStates`."""
    states = HiddenStates(device, device_bytes, host_bytes, path)
    try:
        yield states
    finally:
        states.close()
