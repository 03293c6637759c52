"""Tokens of a micro-batch by modality, indexed once for all windows.

Legend: S tokens, B samples, T = S B tokens, numbered as in [S,B,...] activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_vlm_ptq.calibrate.sketch import TokenRows, assign_tokens
from nemo_vlm_ptq.constants import SKETCH_ROWS
from nemo_vlm_ptq.families.base import IMAGE, TEXT
from nemo_vlm_ptq.megatron.forward import Batch
from nemo_vlm_ptq.utils.pinned_memory import to_device

MODALITIES = (TEXT, IMAGE)  # by row of a statistic
TokenIndex = torch.Tensor | slice  # slice(None) for all tokens avoids a copy of the activations


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """A micro-batch and its token indices, on the device.

    batch: the micro-batch, in host memory.
    modality: [T] int8, 0 padding, TEXT or IMAGE.
    valid: tokens that are not padding.
    by_modality: (row of MODALITIES, its tokens), without a modality that has none.
    counts: [2] int64, in host memory: number of tokens of each modality.
    rows: rows of the sketches that the tokens are added to; None without sketches.
    """

    batch: Batch
    modality: torch.Tensor
    valid: TokenIndex
    by_modality: tuple[tuple[int, TokenIndex], ...]
    counts: torch.Tensor
    rows: TokenRows | None


def index_tokens(batch: Batch, device: torch.device, *, sketches: bool) -> BatchTokens:
    """Index the tokens of a micro-batch."""
    modality_T = batch.modality.T.flatten()

    def index(mask_T: torch.Tensor) -> TokenIndex:
        if bool(mask_T.all()):
            return slice(None)
        return to_device(mask_T.nonzero().flatten(), device)

    masks = [modality_T == modality for modality in MODALITIES]
    counts = torch.stack([mask_T.sum() for mask_T in masks])
    rows = None
    if sketches:
        rows = assign_tokens(batch.sample_ids, batch.modality, SKETCH_ROWS, device)
    return BatchTokens(
        batch=batch,
        modality=to_device(modality_T, device),
        valid=index(modality_T != 0),
        by_modality=tuple((row, index(mask)) for row, mask in enumerate(masks) if counts[row]),
        counts=counts,
        rows=rows,
    )
