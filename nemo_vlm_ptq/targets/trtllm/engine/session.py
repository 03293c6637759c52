"""Open the engine of a format, for the stages `evaluate` and `logits`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.targets.trtllm.engine.client import EngineClient, read_engine_info
from nemo_vlm_ptq.targets.trtllm.engine.installation import find_installation
from nemo_vlm_ptq.workdir import store


@contextmanager
def open_engine(context: RunContext, fmt: QuantFormat) -> Iterator[EngineClient]:
    """Open the engine of a format; its worker process stops when the block ends.

    Raises:
        UserError: the engine is not built, or TensorRT-LLM is not installed.
    """
    plan, folder = context.plan, context.folder(fmt.name, "engine")
    store.require_manifest(folder, "build")
    eos = plan.family.text_config(plan.config).eos_token_id
    client = EngineClient(
        engine=read_engine_info(folder),
        python=find_installation(plan).python,
        kv_cache_fraction=plan.recipe.engine.kv_cache_free_gpu_memory_fraction,
        eos_token_ids=eos if isinstance(eos, list) else [eos],
        torch_vision=None if plan.family.tokens_per_image else _torch_vision(context, fmt),
    )
    try:
        yield client
    finally:
        client.close()


def _torch_vision(context: RunContext, fmt: QuantFormat) -> Callable[[ImageInputs], torch.Tensor]:
    """Return the vision module in torch, for families whose engine returns no image features."""
    plan, device = context.plan, context.parallel.device
    file = context.folder(fmt.name, "trtllm", "vision", "model.safetensors")
    vision = plan.family.build_vision(plan.config, load_file(file), device, context.dtype)

    @torch.no_grad()
    def encode_images(images: ImageInputs) -> torch.Tensor:
        return vision(images.to(device, context.dtype))

    return encode_images


def engine_logits(
    context: RunContext,
    fmt: QuantFormat,
    samples: Sequence[Sample],
    masks: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Compute logits [S,V] float32 of each sample, one at a time; call it on rank 0 only.

    Raises:
        UserError: an attention mask masks tokens, which engines do not support.
    """
    if any(mask is not None and not mask.all() for mask in masks):
        raise UserError("from=engine does not support an attention_mask with zeros; remove it")
    with open_engine(context, fmt) as client:
        logits = []
        for sample in samples:
            feature = None if sample.images is None else client.encode_images(sample.images)
            logits.append(client.logits(sample, feature)[:, : context.plan.decoder.vocab])
        return logits
