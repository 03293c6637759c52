"""Compute the logits of one model in any of its forms: Megatron, source, or exported checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_model
from nemo_vlm_ptq.megatron.compute_dtype import compute_in_dtype
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward, gather_logits
from nemo_vlm_ptq.megatron.parallel_context import free_memory
from nemo_vlm_ptq.planning.forecast import full_model_bytes
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.targets.megatron.quantized_checkpoint import (
    disable_activation_rounding,
    load_quantized,
)
from nemo_vlm_ptq.targets.registry import load_module
from nemo_vlm_ptq.workdir.files import VISION_FILE

Masks = Sequence[torch.Tensor | None]
MEMORY_FRACTION = 0.9  # of free GPU memory that the weights of the reference model may take


def megatron_logits(
    context: RunContext,
    fmt: QuantFormat | None,
    samples: Sequence[Sample],
    dtype: torch.dtype = torch.float32,
    masks: Masks = (),
) -> list[torch.Tensor]:
    """Return logits [S,V] float32 of each sample, one at a time, on every rank (collective).

    Args:
        context: plan and ranks.
        fmt: format of the quantized model; None for the imported 16 bit model.
        samples: the samples.
        dtype: dtype of the computation.
        masks: attention masks [S], 0 where a token is hidden.
    """
    (logits,) = _forward_samples(context, fmt, samples, dtype, masks)
    return logits


def logits_with_and_without_rounding(
    context: RunContext, fmt: QuantFormat, samples: Sequence[Sample]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return logits [S,V] of the quantized model, and those with 16 bit activations and KV cache.

    Weights are quantized in both cases (collective).
    """
    rounded, exact = _forward_samples(
        context, fmt, samples, torch.float32, (), disable_activation_rounding
    )
    return rounded, exact


def _forward_samples(
    context: RunContext,
    fmt: QuantFormat | None,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    masks: Masks,
    *changes: Callable[[Any], None],
) -> list[list[torch.Tensor]]:
    """Return the logits of the model, and again after each change of it."""
    plan, parallel = context.plan, context.parallel
    if fmt is None:
        model = build_decoder(plan.decoder, parallel, context.dtype)
        load_model(model, context.folder("megatron"))
    else:
        model = load_quantized(context, fmt)
    compute_in_dtype(model, dtype)
    vision_tensors = load_file(context.folder("megatron", VISION_FILE))
    vision = plan.family.build_vision(plan.config, vision_tensors, parallel.device, dtype)
    pairs = list(zip(samples, masks or [None] * len(samples), strict=True))
    results = []
    for change in (None, *changes):
        if change is not None:
            change(model)
        parts = []
        for sample, mask in round_robin(pairs, parallel.layout.data, parallel.data_rank):
            (features,) = encode_images(vision, parallel, [[sample]], plan.decoder.hidden)
            out = forward(model, parallel, collate([sample], mask), features)
            if out is not None:
                parts.append(out[0, :, : plan.decoder.vocab].float())
        results.append(gather_logits(parallel, parts, len(samples)))
    del model  # import frames may hold it: see targets/megatron/quantized_checkpoint.py
    gc.collect()  # modelopt's modules hold methods bound to themselves
    return results


def read_model_form(
    context: RunContext, form: str, fmt: QuantFormat | None
) -> tuple[ReadCheckpoint, dict[str, torch.Tensor]]:
    """Read the source (form "hf_source") or an export (a target's name) with the reference reader.

    Returns:
        The decoder, and the tensors of vision tower and projector by published name.
    """
    plan = context.plan
    if fmt is None:
        read = read_source(plan.tensors)
    else:
        read = load_module(form, "reader").read(context.folder(fmt.name, form), plan)
    names = set(plan.vision_names)
    vision = {name: tensor for name, tensor in read.plain.items() if name in names}
    plain = {name: tensor for name, tensor in read.plain.items() if name not in names}
    return ReadCheckpoint(linears=read.linears, plain=plain, kv=read.kv), vision


def load_reference_model(
    context: RunContext,
    form: str,
    fmt: QuantFormat | None,
    dtype: torch.dtype,
    device: torch.device,
) -> ReferenceModel:
    """Load the source or an export into the reference model."""
    read, vision = read_model_form(context, form, fmt)
    return ReferenceModel(context.plan.family, context.plan.config, read, vision, dtype, device)


def fits_on_device(context: RunContext, dtype: torch.dtype) -> bool:
    """Whether the unsharded reference model fits on this rank's GPU; always true on a CPU."""
    device = context.parallel.device
    if device.type == "cpu":
        return True
    return full_model_bytes(context.plan, dtype.itemsize) < MEMORY_FRACTION * free_memory(device)


def reference_device(context: RunContext, dtype: torch.dtype) -> torch.device:
    """Return this rank's GPU if the reference model fits there, else the CPU."""
    if fits_on_device(context, dtype):
        return context.parallel.device
    size = full_model_bytes(context.plan, dtype.itemsize) / 1e9
    context.parallel.log(f"{size:,.1f} GB in {dtype} do not fit on the GPU: using the CPU")
    return torch.device("cpu")


def reference_logits(
    model: ReferenceModel, samples: Sequence[Sample], masks: Masks = ()
) -> list[torch.Tensor]:
    """Return logits [S,V] float32 of each sample; masks [S] hide tokens from attention."""
    logits = []
    for sample, mask in zip(samples, masks or [None] * len(samples), strict=True):
        features = None if sample.images is None else model.encode_images(sample.images)
        logits.append(model.logits(sample, features, mask).cpu())
    return logits
