"""Running samples through a model that is spread over ranks.

A micro-batch is formed by sample ids alone, so its arithmetic is the same on any data or pipeline
rank. Legend: S tokens, B samples, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import IMAGE, TEXT, ImageInputs, Sample
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.megatron.rotary import LongRotaryEmbedding
from nemo_vlm_ptq.utils.pinned_memory import to_device

IMAGES_PER_CALL = 16  # samples whose images a tower looks at in one call


@dataclass(frozen=True)
class Batch:
    """Samples padded to one length on the right.

    input_ids: [B,S] int64; modality: [B,S] int8, 0 padding, TEXT or IMAGE;
    hidden: [B,1,S,S] bool, True where attention must not look, or None for plain causal.
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    modality: torch.Tensor
    hidden: torch.Tensor | None = None


def collate(samples: Sequence[Sample], mask: torch.Tensor | None = None) -> Batch:
    """Pad samples on the right; causal attention keeps padding out of sight.

    mask: [S] of a single sample, 0 where attention must not look besides.
    """
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    modality = torch.zeros(len(samples), length, dtype=torch.int8)
    for row, sample in enumerate(samples):
        count = len(sample.input_ids)
        input_ids[row, :count] = sample.input_ids
        modality[row, :count] = torch.where(sample.is_image, IMAGE, TEXT).to(torch.int8)
    ids = tuple(sample.id for sample in samples)
    return Batch(ids, input_ids, modality, None if mask is None else _hidden(mask))


def _hidden(mask: torch.Tensor) -> torch.Tensor:
    """Attention mask [1,1,S,S], True where hidden; a token always sees itself."""
    length = len(mask)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden = later | (mask == 0)[None, :]
    return (hidden & ~torch.eye(length, dtype=torch.bool))[None, None]


def encode_images(
    vision: Any, parallel: ParallelContext, batches: Sequence[Sequence[Sample]], hidden: int
) -> list[torch.Tensor | None]:
    """Features [image tokens,H] of each micro-batch, sample after sample; None without images.

    Images of a micro-batch are looked at together, so features depend on no other. The tensor ranks
    of the first pipeline stage share micro-batches out; other stages get None.
    """
    if not parallel.first_stage:
        return [None] * len(batches)
    T, dtype = parallel.layout.tensor, next(vision.parameters()).dtype
    owners = dist.get_process_group_ranks(parallel.tensor_group)
    features: list[torch.Tensor | None] = []
    for i, batch in enumerate(batches):
        pixels = [sample.pixels for sample in batch if sample.pixels is not None]
        if not pixels:
            features.append(None)
        elif encodes_images(parallel, i):
            there = [one.to(parallel.device, dtype) for one in pixels]
            features.append(torch.cat([vision(one) for one in _together(there)]))
        else:
            tokens = sum(int(sample.is_image.sum()) for sample in batch)
            features.append(torch.empty(tokens, hidden, dtype=dtype, device=parallel.device))
    if T > 1:
        for i, one in enumerate(features):
            if one is not None:
                dist.broadcast(one, owners[i % T], group=parallel.tensor_group)
    return features


def encodes_images(parallel: ParallelContext, index: int) -> bool:
    """This rank looks at the images of micro-batch `index` of those that are encoded together."""
    return parallel.first_stage and index % parallel.layout.tensor == parallel.tensor


def _together(pixels: Sequence[ImageInputs]) -> list[ImageInputs]:
    """Images of several samples as if of one; those that are cut into views stay by themselves."""
    if any(one.image_sizes is not None for one in pixels):
        return list(pixels)
    parts = [
        pixels[start : start + IMAGES_PER_CALL] for start in range(0, len(pixels), IMAGES_PER_CALL)
    ]
    return [ImageInputs(torch.cat([one.pixel_values for one in part])) for part in parts]


def embed(
    model: GPTModel, batch: Batch, features: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Token embeddings with image features in their places, [S,B,H]."""
    safe_ids = to_device(batch.input_ids.clamp(min=0), device)
    embedded = model.embedding(safe_ids, None)
    embedded = embedded.clone(memory_format=torch.contiguous_format)  # strides as well
    if features is not None:
        sample, token = (batch.modality == IMAGE).nonzero(as_tuple=True)
        places = to_device(token * len(batch.input_ids) + sample, device)
        embedded.flatten(0, 1).index_copy_(0, places, features.to(embedded.dtype))
    return embedded


@torch.no_grad()
def forward(
    model: GPTModel,
    parallel: ParallelContext,
    batch: Batch,
    features: torch.Tensor | None,
) -> torch.Tensor | None:
    """One micro-batch through this rank's stage.

    Returns:
        On the last stage logits [B,S,V], of a model without a head [S,B,H]; else None.
    """
    B, S = batch.input_ids.shape
    check_lengths(model, batch)
    decoder_input = None
    if parallel.first_stage:
        decoder_input = embed(model, batch, features, parallel.device)
    else:
        config = model.config
        received = torch.empty(
            S, B, config.hidden_size, dtype=config.pipeline_dtype, device=parallel.comm_device
        )
        dist.recv(received, parallel.peer(-1))
        model.set_input_tensor(received.to(parallel.device))
    hidden = None if batch.hidden is None else batch.hidden.to(parallel.device)
    input_ids = to_device(batch.input_ids, parallel.device)
    out = model(input_ids, None, hidden, decoder_input=decoder_input)
    if parallel.last_stage:
        return out
    dist.send(out.contiguous().to(parallel.comm_device), parallel.peer(1))
    return None


def check_lengths(model: GPTModel, batch: Batch) -> None:
    """Samples of one batch take the same rotary factors.

    Raises:
        UserError: some are longer than where the factors change, and some are not.
    """
    rotary = model.rotary_pos_emb
    if not isinstance(rotary, LongRotaryEmbedding):
        return
    lengths = (batch.modality != 0).sum(dim=1)
    original = rotary.long_rope.original
    if int(lengths.min()) <= original < int(lengths.max()):
        raise UserError(
            f"samples of {int(lengths.min())} and {int(lengths.max())} tokens are in one "
            f"micro-batch, and rotary factors change after {original}; "
            "set calibration.micro_batch=1"
        )


def gather_logits(
    parallel: ParallelContext, parts: Iterable[torch.Tensor], total: int
) -> list[torch.Tensor]:
    """Logits of all micro-batches in order, on every rank; `parts` are those of this data rank."""
    holder = parallel.last_stage and parallel.tensor == 0
    mine = (parallel.data, [part.cpu() for part in parts]) if holder else None
    by_data = dict(entry for entry in parallel.gather(mine) if entry is not None)
    world = parallel.layout.data
    return [by_data[i % world][i // world] for i in range(total)]
