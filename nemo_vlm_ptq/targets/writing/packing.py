"""Codes into bytes: which nibble lies where, for each kind of number."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack_rows(codes_OK: torch.Tensor) -> torch.Tensor:
    """int4 codes [O,K] -> bytes [O/2,K] int8: row 2i in the low nibble, row 2i+1 in the high."""
    low, high = codes_OK[0::2] & 15, codes_OK[1::2] & 15
    return (low | (high << 4)).to(torch.int8)


def pack_columns(nibbles_OK: torch.Tensor) -> torch.Tensor:
    """nvfp4 nibbles [O,K] uint8 -> bytes [O,K/2]: column 2i in the low nibble, 2i+1 in the high."""
    return nibbles_OK[:, 0::2] | (nibbles_OK[:, 1::2] << 4)


def pack_flat(nibbles_OK: torch.Tensor) -> torch.Tensor:
    """nf4 nibbles [O,K] uint8 -> bytes [O*K/2,1] in bitsandbytes' order: the first one is high."""
    flat = nibbles_OK.flatten()
    return ((flat[0::2] << 4) | flat[1::2])[:, None]


def concat_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors above each other, those of one byte a number too; one alone is not copied."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if first.dtype == torch.float8_e4m3fn:
        return torch.cat([part.view(torch.int8) for part in parts]).view(first.dtype)
    return torch.cat(list(parts))
