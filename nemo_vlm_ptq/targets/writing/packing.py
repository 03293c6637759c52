"""Pack 4 bit codes into bytes: each target fixes which code is in which nibble.

Legend: O output features, K input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack_rows(codes_OK: torch.Tensor) -> torch.Tensor:
    """Pack int4 codes [O,K] to int8 [O/2,K]: row 2i in the low nibble, 2i+1 in the high."""
    low, high = codes_OK[0::2] & 15, codes_OK[1::2] & 15
    return (low | (high << 4)).to(torch.int8)


def pack_columns(codes_OK: torch.Tensor) -> torch.Tensor:
    """Pack nvfp4 codes [O,K] uint8 to [O,K/2]: column 2i in the low nibble, 2i+1 in the high."""
    return codes_OK[:, 0::2] | (codes_OK[:, 1::2] << 4)


def pack_flat(codes_OK: torch.Tensor) -> torch.Tensor:
    """Pack nf4 codes [O,K] uint8 to [O*K/2,1] as bitsandbytes does: high nibble first."""
    flat = codes_OK.flatten()
    return ((flat[0::2] << 4) | flat[1::2])[:, None]


def concat_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate along dimension 0; a single part is not copied.

    float8 tensors are concatenated as bytes, which every backend supports.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if first.dtype == torch.float8_e4m3fn:
        return torch.cat([part.view(torch.int8) for part in parts]).view(first.dtype)
    return torch.cat(list(parts))
