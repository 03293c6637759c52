"""A model that computes in another dtype than its weights have, with one layer's copy at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

Held = list[tuple[torch.Tensor, torch.Tensor]]  # parameters and buffers with what was in them


def compute_in_dtype(model: GPTModel, dtype: torch.dtype) -> None:
    """From now on the model computes in `dtype`, as after `model.to(dtype)`.

    Embedding, layers, last norm and head are cast when they run and are as before when they have
    run: a 16 bit model that answers in float32 does not double.
    """
    model.config.pipeline_dtype = dtype
    ends = [getattr(model, "embedding", None), getattr(model, "output_layer", None)]
    for part in [*ends, *model.decoder.layers, model.decoder.final_layernorm]:
        if part is not None:
            held: Held = []
            part.register_forward_pre_hook(partial(_cast, held, dtype))
            part.register_forward_hook(partial(_restore, held), always_call=True)


def _cast(held: Held, dtype: torch.dtype, part: torch.nn.Module, args: Any) -> None:
    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.is_floating_point():
            held.append((tensor, tensor.data))
            tensor.data = tensor.data.to(dtype)


def _restore(held: Held, part: torch.nn.Module, args: Any, output: Any) -> None:
    for tensor, before in held:
        tensor.data = before
    held.clear()
