"""The engine of a format as something that can be asked, by `evaluate` and by `logits`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.targets.trtllm.engine.installation import find_builder
from nemo_vlm_ptq.targets.trtllm.engine.runtime import EngineRuntime, read_engines
from nemo_vlm_ptq.workdir import store


@contextmanager
def open_engine(job: RunContext, fmt: QuantFormat) -> Iterator[EngineRuntime]:
    """The engine, asked through TensorRT-LLM on this machine; its process ends with the block.

    Raises:
        UserError: it is not built, or TensorRT-LLM is not here.
    """
    plan, folder = job.plan, job.folder(fmt.name, "engine")
    store.require_manifest(folder, "build")
    eos = plan.family.text_config(plan.config).eos_token_id
    runtime = EngineRuntime(
        read_engines(folder),
        find_builder(plan).python,
        plan.recipe.engine.kv_cache_free_gpu_memory_fraction,
        eos if isinstance(eos, list) else [eos],
        None if plan.family.tokens_per_image else _torch_tower(job, fmt),
    )
    try:
        yield runtime
    finally:
        runtime.close()


def _torch_tower(job: RunContext, fmt: QuantFormat) -> Callable[[ImageInputs], torch.Tensor]:
    """Images -> features, where TensorRT-LLM's engine does not go all the way to image tokens."""
    plan, device = job.plan, job.parallel.device
    file = job.folder(fmt.name, "trtllm", "vision", "model.safetensors")
    tower = plan.family.build_vision(plan.config, load_file(file), device, job.dtype)

    @torch.no_grad()
    def look(pixels: ImageInputs) -> torch.Tensor:
        return tower(pixels.to(device, job.dtype))

    return look


def engine_logits(
    job: RunContext,
    fmt: QuantFormat,
    samples: Sequence[Sample],
    masks: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Logits [S,V] float32 of each sample, one at a time, on rank 0.

    Raises:
        UserError: a mask hides tokens, which an engine cannot do.
    """
    if any(mask is not None and not mask.all() for mask in masks):
        raise UserError("from=engine takes no attention_mask that hides tokens; leave it out")
    with open_engine(job, fmt) as runtime:
        out = []
        for sample in samples:
            feature = None if sample.pixels is None else runtime.encode(sample.pixels)
            out.append(runtime.logits(sample, feature)[:, : job.plan.decoder.vocab])
        return out
