"""Compute the logits of one model in any of its forms: Megatron, source, or exported checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, load_model
from nemo_vlm_ptq.megatron.compute_dtype import compute_in_dtype
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward, gather_logits
from nemo_vlm_ptq.megatron.parallel_context import free_memory
from nemo_vlm_ptq.planning.forecast import full_model_bytes
from nemo_vlm_ptq.planning.windows import layers_in_memory, stage_windows
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision
from nemo_vlm_ptq.targets.megatron.quantized_checkpoint import (
    build_quantized,
    disable_activation_rounding,
    load_quantized,
)
from nemo_vlm_ptq.targets.registry import load_module

Masks = Sequence[torch.Tensor | None]
WINDOW_MEMORY_FRACTION = 0.25  # of free memory that the 16 bit weights of a window may take
MEMORY_FRACTION = 0.9  # of free GPU memory that the weights of the reference model may take


def stored_logits(
    context: RunContext,
    fmt: QuantFormat | None,
    samples: Sequence[Sample],
    dtype: torch.dtype = torch.float32,
    masks: Masks = (),
) -> list[torch.Tensor]:
    """Return logits [S,V] float32 of a Megatron checkpoint for each sample (collective).

    Args:
        context: plan and ranks.
        fmt: format of the quantized checkpoint; None for the imported 16 bit one.
        samples: the samples, which are run one at a time.
        dtype: dtype of the computation.
        masks: attention masks [S], 0 where a token is hidden.
    """
    plan, parallel = context.plan, context.parallel

    def build(_: range) -> Any:
        if fmt is not None:
            return load_quantized(context, fmt)
        model = build_decoder(plan.decoder, parallel, context.dtype)
        load_model(model, context.folder("megatron"))
        return model

    layers, stages = plan.decoder.layers, parallel.layout.pipeline
    stage = stage_windows(layers, stages, parallel.pipeline_rank, layers)
    (logits,) = _forward_samples(context, build, stage, samples, dtype, masks)
    return logits


def source_logits(context: RunContext, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Return logits [S,V] of the 16 bit model, in memory, window by window (collective)."""
    plan, parallel = context.plan, context.parallel

    def build(window: range) -> Any:
        model = build_decoder(plan.decoder, parallel, context.dtype, window=window)
        with open_weights(plan, parallel.device) as weights:
            load_from_source(model, parallel, weights)
        return model

    windows = _windows(context)
    (logits,) = _forward_samples(context, build, windows, samples, torch.float32, ())
    return logits


def quantized_logits(
    context: RunContext, fmt: QuantFormat, samples: Sequence[Sample]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return logits [S,V] of the quantized model, and those with 16 bit activations and KV cache.

    The model is made in memory from source and scales, window by window. Weights are quantized in
    both cases (collective).
    """
    build = partial(build_quantized, context, fmt)
    rounds = fmt.activation is not None or context.plan.recipe.quantize.kv_cache != "none"
    changes = [disable_activation_rounding] if rounds else []
    results = _forward_samples(
        context, build, _windows(context), samples, torch.float32, (), *changes
    )
    return results[0], results[-1]


def _windows(context: RunContext) -> list[range]:
    """Return the windows of this stage's layers: as many at a time as half of the memory holds."""
    plan, parallel = context.plan, context.parallel
    tensor, pipeline = parallel.layout.tensor, parallel.layout.pipeline
    memory = int(WINDOW_MEMORY_FRACTION * free_memory(parallel.device))
    size = layers_in_memory(plan, tensor, pipeline, min(parallel.all_gather(memory)))
    first = plan.decoder.deepstack_layers
    return stage_windows(plan.decoder.layers, pipeline, parallel.pipeline_rank, size, first)


def _forward_samples(
    context: RunContext,
    build: Callable[[range], Any],
    windows: Sequence[range],
    samples: Sequence[Sample],
    dtype: torch.dtype,
    masks: Masks,
    *changes: Callable[[Any], None],
) -> list[list[torch.Tensor]]:
    """Return the logits of the model, and again after each change of its windows.

    Args:
        context: plan and ranks.
        build: layers -> the window that holds them.
        windows: windows of this pipeline stage, in order.
        samples: the samples.
        dtype: dtype of the computation.
        masks: attention masks.
        changes: of a window, in place, one after another.
    """
    plan, parallel = context.plan, context.parallel
    pairs = list(zip(samples, masks or [None] * len(samples), strict=True))
    own = round_robin(pairs, parallel.layout.data, parallel.data_rank)
    vision = plan.family.build_vision(plan.config, read_vision(plan), parallel.device, dtype)
    width = plan.decoder.feature_width
    features = [encode_images(vision, parallel, [[sample]], width)[0] for sample, _ in own]
    del vision
    states: list[list[Any]] = [[None] * len(own) for _ in range(1 + len(changes))]
    for window in windows:
        model = build(window)
        compute_in_dtype(model, dtype)
        for states_of_change, change in zip(states, (None, *changes), strict=True):
            if change is not None:
                change(model)
            for i, (sample, mask) in enumerate(own):
                states_of_change[i] = forward(
                    model,
                    parallel,
                    collate([sample], mask),
                    features[i],
                    states_of_change[i],
                    ends_stage=window is windows[-1],
                )
        del model  # import frames may hold it: see targets/megatron/quantized_checkpoint.py
        gc.collect()  # modelopt's modules hold methods bound to themselves
    vocab = plan.decoder.vocab
    results = []
    for outputs in states:
        logits = [out[0, :, :vocab].float() for out in outputs if parallel.last_stage]
        results.append(gather_logits(parallel, logits, len(samples)))
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
        read = load_module(form, "reader").read(context.plan.export_folder(fmt, form), plan)
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
