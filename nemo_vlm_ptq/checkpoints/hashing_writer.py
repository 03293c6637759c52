"""Writer of a safetensors file that hashes the bytes while it writes them.

GPU tensors pass through one pinned staging buffer, which torch's allocator reuses for the next
file, in a stream of their own. That is several times as fast as a pageable copy, takes little host
memory and does not block computation. `safetensors.torch.save_file` needs all tensors of the file
on the host, and pinning that much memory takes longer than writing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.streaming_writer import SAFETENSORS_DTYPES

STAGING_BYTES = 1 << 26


def write_and_hash(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write tensors to a safetensors file and return its sha256.

    Args:
        tensors: by name, all on one device.
        path: of the file.

    Returns:
        The sha256 of the file as hex digits.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, size = _header(tensors, order)
    digest = hashlib.sha256(header)
    device = tensors[order[0]].device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.default_stream(device))
    staging = torch.empty(
        min(STAGING_BYTES, size), dtype=torch.uint8, pin_memory=stream is not None
    )
    with torch.cuda.stream(stream), path.open("wb") as file:  # a no-op if the stream is None
        file.write(header)
        for name in order:
            flat = tensors[name].detach().contiguous().view(-1).view(torch.uint8)
            for part in flat.split(STAGING_BYTES):
                staged = staging[: len(part)]
                staged.copy_(part, non_blocking=True)
                if stream is not None:
                    stream.synchronize()
                file.write(staged.numpy().data)
                digest.update(staged.numpy().data)
    return digest.hexdigest()


def _header(tensors: Mapping[str, torch.Tensor], order: list[str]) -> tuple[bytes, int]:
    """Return the header, with its length in front, and the number of bytes that follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end
