"""Sketch of a linear's input: an estimate of its second moment that is cheap to gather and to use.

Every token is added to one of SKETCH_ROWS rows, with a sign. Row and sign come from a hash of the
sample's id and the token's position. Of the sum S X of such rows, |dW (S X)^T|^2 estimates the loss
tr(dW X^T X dW^T) without bias: products of different tokens cancel. The diagonal blocks of X^T X
that clipping needs are kept exactly.

Each micro-batch's sums are float32, in the order of its tokens. They are rounded to a multiple of a
unit and added in float64, where sums of such multiples are exact, so that the result depends
neither on the order of micro-batches nor on the rank that runs them.

Legend: T tokens of a micro-batch, m rows, K input features, G blocks of g features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_vlm_ptq.calibrate.second_moments import MOMENT_UNIT
from nemo_vlm_ptq.constants import BLOCK_FEATURES
from nemo_vlm_ptq.utils.pinned_memory import to_device

SKETCH_UNIT = 2.0**-24
SKETCH_LIMIT = 2.0**53 * SKETCH_UNIT


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of the sketches of both modalities that the tokens of a micro-batch are added to.

    order: [T'] int64, tokens that are not padding, sorted by row, then by position.
    starts: [2m+1] int64, start of each row's tokens in `order`.
    signs: [T'] float32, 1 or -1, in that order.
    """

    order: torch.Tensor
    starts: torch.Tensor
    signs: torch.Tensor


def assign_tokens(
    sample_ids: Sequence[str], modality_BS: torch.Tensor, rows: int, device: torch.device
) -> TokenRows:
    """Assign the tokens of a micro-batch to rows and signs.

    Args:
        sample_ids: ids of its B samples.
        modality_BS: int8, 0 padding, 1 text, 2 image; tokens are numbered as in [S,B] activations.
        rows: rows of each modality's sketch.
        device: of the result.
    """
    length = modality_BS.shape[1]
    hashes_SB = np.stack([_hash_positions(sample_id, length) for sample_id in sample_ids], axis=1)
    hashes, modality = hashes_SB.reshape(-1), modality_BS.T.reshape(-1).numpy().astype(np.int64)
    bucket = (hashes >> np.uint64(1)) % np.uint64(rows)
    row = bucket.astype(np.int64) + (modality - 1) * rows
    valid = np.flatnonzero(modality)
    order = valid[np.argsort(row[valid], kind="stable")]
    starts = np.searchsorted(row[order], np.arange(2 * rows + 1))
    signs = 1.0 - 2.0 * (hashes[order] & np.uint64(1)).astype(np.float32)
    parts = (torch.from_numpy(part) for part in (order, starts, signs.astype(np.float32)))
    order_T, starts_M, signs_T = (to_device(part, device) for part in parts)
    return TokenRows(order=order_T, starts=starts_M, signs=signs_T)


def _hash_positions(sample_id: str, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return a 64 bit hash of each position of a sample: splitmix64 seeded by sha256 of the id."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little"))
    z = seed + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def accumulate_sketch(sketch_MK: torch.Tensor, x_TK: torch.Tensor, tokens: TokenRows) -> None:
    """Add the tokens of a micro-batch to the sketches of both modalities in place.

    Args:
        sketch_MK: float64 [2m,K], in multiples of SKETCH_UNIT.
        x_TK: tokens, padding included.
        tokens: their rows.
    """
    if x_TK.is_cuda:
        from nemo_vlm_ptq.calibrate import sum_kernels

        sum_kernels.add_signed_rows(
            sketch_MK, x_TK, tokens.order, tokens.starts, tokens.signs, 1 / SKETCH_UNIT
        )
        return
    signed_TK = x_TK[tokens.order].float() * tokens.signs[:, None]
    sums_MK = torch.segment_reduce(signed_TK, "sum", offsets=tokens.starts, axis=0, initial=0.0)
    sketch_MK += (sums_MK * (1 / SKETCH_UNIT)).double().round_()


def block_features(width: int) -> int:
    """Return the features of a diagonal block of an input with `width` features."""
    return math.gcd(width, BLOCK_FEATURES)


def zero_blocks(width: int, device: torch.device) -> torch.Tensor:
    """Return the diagonal blocks of both modalities without tokens, float64 [2,G,g,g]."""
    g = block_features(width)
    return torch.zeros(2, width // g, g, g, dtype=torch.float64, device=device)


def accumulate_blocks(
    blocks_MGgg: torch.Tensor, x_TK: torch.Tensor, modality_T: torch.Tensor
) -> None:
    """Add the tokens of a micro-batch to the diagonal blocks in place; products are float32.

    Args:
        blocks_MGgg: of text, then of image tokens, in multiples of MOMENT_UNIT.
        x_TK: tokens, padding included.
        modality_T: int8, 0 padding, 1 text, 2 image.
    """
    if x_TK.is_cuda and x_TK.dtype != torch.float32:
        from nemo_vlm_ptq.calibrate import sum_kernels

        if blocks_MGgg.shape[2] >= sum_kernels.MIN_BLOCK:
            sum_kernels.add_blocks(blocks_MGgg, x_TK, modality_T, 1 / MOMENT_UNIT)
            return
    for modality, blocks_Ggg in enumerate(blocks_MGgg, start=1):
        x_GTg = x_TK[modality_T == modality].unflatten(1, (len(blocks_Ggg), -1)).transpose(0, 1)
        product = torch.bmm(x_GTg.transpose(1, 2).float(), x_GTg.float())
        blocks_Ggg += product.mul_(1 / MOMENT_UNIT).round_()
