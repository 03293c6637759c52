"""One model in any of its forms, asked for logits: what `logits` writes and `verify` compares."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_model
from nemo_vlm_ptq.megatron.compute_dtype import compute_in_dtype
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward, gather_logits
from nemo_vlm_ptq.megatron.parallel_context import free_memory
from nemo_vlm_ptq.planning.forecast import full_model_bytes
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.stages.import_model import VISION_FILE
from nemo_vlm_ptq.targets.compressed_tensors.reader import read_compressed_tensors
from nemo_vlm_ptq.targets.hf.reader import read_source, read_unified
from nemo_vlm_ptq.targets.megatron.quantized_checkpoint import (
    disable_activation_rounding,
    load_quantized,
)
from nemo_vlm_ptq.targets.nemo2.reader import read_nemo
from nemo_vlm_ptq.targets.trtllm.reader import read_trtllm

Masks = Sequence[torch.Tensor | None]
MEMORY_FRACTION = (
    0.9  # of the memory left free on a GPU, for the weights of a model that answers there
)


def megatron_logits(
    job: RunContext,
    fmt: QuantFormat | None,
    samples: Sequence[Sample],
    dtype: torch.dtype = torch.float32,
    masks: Masks = (),
) -> list[torch.Tensor]:
    """Logits [S,V] float32 of each sample, one at a time, on every rank (collective).

    fmt None is the imported 16 bit model; masks [S] hide tokens from attention.
    """
    (logits,) = _ask(job, fmt, samples, dtype, masks)
    return logits


def logits_with_and_without_rounding(
    job: RunContext, fmt: QuantFormat, samples: Sequence[Sample]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits [S,V] of the quantized model as it is, and with activations and KV cache not rounded.

    The weights are in the format both times (collective).
    """
    rounded, exact = _ask(job, fmt, samples, torch.float32, (), disable_activation_rounding)
    return rounded, exact


def _ask(
    job: RunContext,
    fmt: QuantFormat | None,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    masks: Masks,
    *changes: Callable[[Any], None],
) -> list[list[torch.Tensor]]:
    """Logits of the model, and again after each change."""
    plan, parallel = job.plan, job.parallel
    if fmt is None:
        model = build_decoder(plan.decoder, parallel, job.dtype)
        load_model(model, job.folder("megatron"))
    else:
        model = load_quantized(job, fmt)
    compute_in_dtype(model, dtype)
    beside = load_file(job.folder("megatron", VISION_FILE))
    vision = plan.family.build_vision(plan.config, beside, parallel.device, dtype)
    pairs = list(zip(samples, masks or [None] * len(samples), strict=True))
    found = []
    for change in (None, *changes):
        if change is not None:
            change(model)
        parts = []
        for sample, mask in round_robin(pairs, parallel.layout.data, parallel.data):
            (features,) = encode_images(vision, parallel, [[sample]], plan.decoder.hidden)
            out = forward(model, parallel, collate([sample], mask), features)
            if out is not None:
                parts.append(out[0, :, : plan.decoder.vocab].float())
        found.append(gather_logits(parallel, parts, len(samples)))
    del model  # frames may be kept: see stages/quantizing.py
    gc.collect()  # modelopt's modules hold methods bound to themselves
    return found


def read_model_form(
    job: RunContext, form: str, fmt: QuantFormat | None
) -> tuple[ReadCheckpoint, dict[str, torch.Tensor]]:
    """A written form read back: its decoder, and the tensors of tower and projector.

    Raises:
        UserError: unknown form.
    """
    plan = job.plan
    names = plan.vision_names
    if form == "hf_source":
        read = read_source(plan.tensors)
    elif form == "trtllm" and fmt is not None:
        folder = job.folder(fmt.name, "trtllm")
        read = read_trtllm(folder / "llm", plan.family.decoder_prefix)
        return read, load_file(folder / "vision" / "model.safetensors")
    elif form == "hf" and fmt is not None:
        read = read_unified(job.folder(fmt.name, "hf"), plan.family)
    elif form == "compressed_tensors" and fmt is not None:
        read = read_compressed_tensors(job.folder(fmt.name, form), plan.family)
    elif form == "nemo" and fmt is not None:
        read = read_nemo(job.folder(fmt.name, form), plan.decoder, plan.family.decoder_prefix)
    else:
        raise UserError(f"from={form} is not known; known: hf_source, megatron, quantized, "
                        "trtllm, hf, compressed_tensors, nemo")  # fmt: skip
    vision = {name: read.plain[name] for name in names if name in read.plain}
    plain = {name: tensor for name, tensor in read.plain.items() if name not in names}
    return ReadCheckpoint(read.linears, plain, read.kv), vision


def load_reference_model(
    job: RunContext, form: str, fmt: QuantFormat | None, dtype: torch.dtype, device: torch.device
) -> ReferenceModel:
    """The independent runtime on a written form."""
    read, vision = read_model_form(job, form, fmt)
    return ReferenceModel(job.plan.family, job.plan.config, read, vision, dtype, device)


def fits_on_device(job: RunContext, dtype: torch.dtype) -> bool:
    """The runtime, which is never cut, has room on this rank's GPU; always where there is none."""
    device = job.parallel.device
    if device.type == "cpu":
        return True
    return full_model_bytes(job.plan, dtype.itemsize) < MEMORY_FRACTION * free_memory(device)


def reference_device(job: RunContext, dtype: torch.dtype) -> torch.device:
    """Where the runtime answers a few samples: this rank's GPU if it has room, else the host."""
    if fits_on_device(job, dtype):
        return job.parallel.device
    size = full_model_bytes(job.plan, dtype.itemsize) / 1e9
    job.parallel.log(f"the GPU has no room for {size:,.1f} GB in {dtype}: asking the host")
    return torch.device("cpu")


def reference_logits(
    runtime: ReferenceModel, samples: Sequence[Sample], masks: Masks = ()
) -> list[torch.Tensor]:
    """Logits [S,V] float32 of each sample; masks [S] hide tokens from attention."""
    out = []
    for sample, mask in zip(samples, masks or [None] * len(samples), strict=True):
        feature = None
        if sample.pixels is not None:
            feature = runtime.encode(sample.pixels)
        out.append(runtime.logits(sample, feature, mask).cpu())
    return out


def exported_bytes(folder: Path) -> int:
    """Bytes of the weights of an export."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
