"""Statistics into a safetensors file, piece by piece.

From a GPU they go through one piece of page-locked memory, which torch keeps for the next file, on
a stream of their own: several times faster than a plain copy, little memory on the host, and
whoever computes is not held up. The library would want all of a layer on the host, and page-locking
as much takes longer than writing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.streaming_writer import NAMES

PIECE = 1 << 26  # bytes


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write a file of tensors that are on one device; returns its sha256, hex."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = about | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start_of_file = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(start_of_file)
    device = tensors[order[0]].device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.default_stream(device))
    piece = torch.empty(min(PIECE, end), dtype=torch.uint8, pin_memory=stream is not None)
    with torch.cuda.stream(stream), path.open("wb") as file:  # None: the stream as it is
        file.write(start_of_file)
        for name in order:
            every = tensors[name].detach().contiguous().view(-1).view(torch.uint8)
            for part in every.split(PIECE):
                own = piece[: len(part)]
                own.copy_(part, non_blocking=True)
                if stream is not None:
                    stream.synchronize()
                file.write(own.numpy().data)
                digest.update(own.numpy().data)
    return digest.hexdigest()
