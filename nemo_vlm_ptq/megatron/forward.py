"""Forward pass of micro-batches through a tensor-, pipeline- and data-parallel model.

The composition of a micro-batch is independent of the layout, so its arithmetic is the same on
every data rank and with every pipeline size.

Legend: S tokens, B samples, H hidden size, V vocabulary.
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
from nemo_vlm_ptq.megatron.deepstack import set_deepstack
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.megatron.rotary import LongRotaryEmbedding
from nemo_vlm_ptq.utils.pinned_memory import to_device

MAX_SAMPLES_PER_VISION_CALL = 16


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of samples, right-padded to a common length.

    Attributes:
        sample_ids: ids of the samples.
        input_ids: [B,S] int64.
        modality: [B,S] int8: 0 padding, TEXT or IMAGE.
        attention_mask: [B,1,S,S] bool, True where masked out (Megatron's convention); None: causal.
        positions: [3,B,S] int64, 0 at padding; None: tokens count up.
    """

    sample_ids: tuple[str, ...]
    input_ids: torch.Tensor
    modality: torch.Tensor
    attention_mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None


def collate(samples: Sequence[Sample], key_mask: torch.Tensor | None = None) -> Batch:
    """Right-pad samples into a batch; causal attention never attends to right padding.

    Args:
        samples: one or more samples.
        key_mask: [S], for a batch of one sample: 0 for keys that are masked out in addition to the
            causal mask.
    """
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    modality = torch.zeros(len(samples), length, dtype=torch.int8)
    positions = None
    if samples[0].positions is not None:
        positions = torch.zeros(3, len(samples), length, dtype=torch.int64)
    for index, sample in enumerate(samples):
        count = len(sample.input_ids)
        input_ids[index, :count] = sample.input_ids
        modality[index, :count] = torch.where(sample.is_image, IMAGE, TEXT).to(torch.int8)
        if positions is not None and sample.positions is not None:
            positions[:, index, :count] = sample.positions
    return Batch(
        sample_ids=tuple(sample.id for sample in samples),
        input_ids=input_ids,
        modality=modality,
        attention_mask=None if key_mask is None else _causal_mask(key_mask),
        positions=positions,
    )


def _causal_mask(key_mask: torch.Tensor) -> torch.Tensor:
    """Return the mask [1,1,S,S], True where masked out; the diagonal is never masked."""
    length = len(key_mask)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    masked = future | (key_mask == 0)[None, :]
    return (masked & ~torch.eye(length, dtype=torch.bool))[None, None]


def _bidirectional_mask(batch: Batch) -> torch.Tensor:
    """Return the mask [B,1,S,S], True where masked out.

    Tokens of an image attend to each other. Images have text between them.
    """
    is_image = batch.modality == IMAGE
    starts = is_image & ~is_image.roll(1, dims=1)
    starts[:, 0] = is_image[:, 0]
    image = torch.where(is_image, starts.cumsum(dim=1), 0)
    same = (image[:, :, None] == image[:, None, :]) & is_image[:, None]
    masked = batch.attention_mask
    if masked is None:
        masked = _causal_mask(torch.ones(batch.input_ids.shape[1]))
    return masked & ~same[:, None]


def encode_images(
    vision: Any,
    parallel: ParallelContext,
    micro_batches: Sequence[Sequence[Sample]],
    width: int,
) -> list[torch.Tensor | None]:
    """Compute the image features of micro-batches (collective over the first stage's TP group).

    Each micro-batch is encoded on its own, so its features do not depend on the others. The tensor
    ranks of the first pipeline stage encode the micro-batches round-robin and broadcast the
    features.

    Returns:
        Per micro-batch [image tokens,width] in sample order; None without images and on later
        stages.
    """
    if not parallel.first_stage:
        return [None] * len(micro_batches)
    T, dtype = parallel.layout.tensor, next(vision.parameters()).dtype
    group_ranks = dist.get_process_group_ranks(parallel.tensor_group)
    features: list[torch.Tensor | None] = []
    for i, samples in enumerate(micro_batches):
        images = [sample.images for sample in samples if sample.images is not None]
        if not images:
            features.append(None)
        elif is_encoding_rank(parallel, i):
            on_device = [image.to(parallel.device, dtype) for image in images]
            features.append(torch.cat([vision(inputs) for inputs in _merge(on_device)]))
        else:
            tokens = sum(int(sample.is_image.sum()) for sample in samples)
            features.append(torch.empty(tokens, width, dtype=dtype, device=parallel.device))
    if T > 1:
        for i, feature in enumerate(features):
            if feature is not None:
                dist.broadcast(feature, group_ranks[i % T], group=parallel.tensor_group)
    return features


def is_encoding_rank(parallel: ParallelContext, index: int) -> bool:
    """Return whether this rank encodes the images of micro-batch `index` in `encode_images`."""
    return parallel.first_stage and index % parallel.layout.tensor == parallel.tensor_rank


def _merge(images: Sequence[ImageInputs]) -> list[ImageInputs]:
    """Concatenate the inputs of samples per vision call; images of many sizes stay separate."""
    own = [
        (image.image_sizes, image.grids, image.pixel_mask, image.patch_positions)
        for image in images
    ]
    if any(tensor is not None for tensors in own for tensor in tensors):
        return list(images)
    step = MAX_SAMPLES_PER_VISION_CALL
    groups = [images[start : start + step] for start in range(0, len(images), step)]
    return [
        ImageInputs(pixel_values=torch.cat([image.pixel_values for image in group]))
        for group in groups
    ]


def embed(
    model: GPTModel, batch: Batch, features: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return token embeddings [S,B,H] with image features at the image placeholder tokens.

    Features are [n,H], or [n,(1+layers)*H] for a model with deepstack, which takes the rest.
    """
    safe_ids = to_device(batch.input_ids.clamp(min=0), device)  # placeholder ids may be negative
    embedded = model.embedding(safe_ids, None)
    # clone() also normalizes the strides of size-1 dimensions, which contiguous() keeps and which
    # differ between TP sizes.
    embedded = embedded.clone(memory_format=torch.contiguous_format)
    positions = deeper = None
    if features is not None:
        features, deeper = features.tensor_split([embedded.shape[-1]], dim=1)
        sample, token = (batch.modality == IMAGE).nonzero(as_tuple=True)
        positions = to_device(token * len(batch.input_ids) + sample, device)
        embedded.flatten(0, 1).index_copy_(0, positions, features.to(embedded.dtype))
    if hasattr(model, "deepstack"):
        set_deepstack(model, positions, deeper)
    return embedded


@torch.no_grad()
def forward(
    model: GPTModel,
    parallel: ParallelContext,
    batch: Batch,
    features: torch.Tensor | None,
    states: torch.Tensor | None = None,
    *,
    ends_stage: bool = True,
) -> torch.Tensor | None:
    """Run one micro-batch through a window of layers, or all layers of this pipeline stage.

    Args:
        model: the window.
        parallel: coordinates of this rank.
        batch: the micro-batch.
        features: its image features, if the window has the embedding.
        states: hidden states [S,B,H] in front of the window; without the embedding and without
            them, they are received from the previous stage.
        ends_stage: whether the window holds the stage's last layer, so that its output is sent to
            the next stage.

    Returns:
        Logits [B,S,V] if the window has the output layer, else the hidden states behind it; None if
        they were sent.

    Raises:
        UserError: see `validate_rope_lengths`.
    """
    validate_rope_lengths(model, batch)
    decoder_input = None
    if model.pre_process:
        decoder_input = embed(model, batch, features, parallel.device)
    else:
        model.set_input_tensor(_receive(model, parallel, batch) if states is None else states)
    mask = batch.attention_mask
    if model.bidirectional_images and bool((batch.modality == IMAGE).any()):
        mask = _bidirectional_mask(batch)
    attention_mask = None if mask is None else mask.to(parallel.device)
    input_ids = to_device(batch.input_ids, parallel.device)
    positions = None if batch.positions is None else to_device(batch.positions, parallel.device)
    output: torch.Tensor = model(input_ids, positions, attention_mask, decoder_input=decoder_input)
    if not ends_stage or parallel.last_stage:
        return output
    dist.send(output.contiguous().to(parallel.comm_device), parallel.pipeline_peer(1))
    return None


def _receive(model: GPTModel, parallel: ParallelContext, batch: Batch) -> torch.Tensor:
    """Receive hidden states [S,B,H] from the previous pipeline stage."""
    B, S = batch.input_ids.shape
    received = torch.empty(
        S,
        B,
        model.config.hidden_size,
        dtype=model.config.pipeline_dtype,
        device=parallel.comm_device,
    )
    dist.recv(received, parallel.pipeline_peer(-1))
    return received.to(parallel.device)


def validate_rope_lengths(model: GPTModel, batch: Batch) -> None:
    """Reject batches that mix samples with short and with long LongRoPE factors.

    Raises:
        UserError: sample lengths on both sides of the original context length.
    """
    rotary = model.rotary_pos_emb
    if not isinstance(rotary, LongRotaryEmbedding):
        return
    lengths = (batch.modality != 0).sum(dim=1)
    original = rotary.long_rope.original_max_positions
    if int(lengths.min()) <= original < int(lengths.max()):
        raise UserError(
            f"samples of {int(lengths.min())} and {int(lengths.max())} tokens are in one "
            f"micro-batch, but LongRoPE factors change after {original} tokens; "
            "set calibration.micro_batch=1"
        )


def gather_logits(
    parallel: ParallelContext, logits: Iterable[torch.Tensor], micro_batches: int
) -> list[torch.Tensor]:
    """Gather the logits of all micro-batches, in order, on every rank (collective).

    Args:
        parallel: coordinates of this rank.
        logits: of this data rank's micro-batches, which are distributed round-robin.
        micro_batches: number of micro-batches of all data ranks.
    """
    is_source = parallel.last_stage and parallel.tensor_rank == 0
    own = (parallel.data_rank, [part.cpu() for part in logits]) if is_source else None
    by_rank = dict(entry for entry in parallel.all_gather(own) if entry is not None)
    data_size = parallel.layout.data
    return [by_rank[i % data_size][i // data_size] for i in range(micro_batches)]
