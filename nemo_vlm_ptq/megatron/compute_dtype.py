"""Compute in another dtype than the weights are stored in, casting one layer at a time.

A 16 bit model evaluated in float32 needs extra memory for one float32 layer instead of a second,
float32 copy of the model. The cost is one cast of every weight per forward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

SavedTensors = list[tuple[torch.Tensor, torch.Tensor]]  # (parameter or buffer, original data)


def compute_in_dtype(model: GPTModel, dtype: torch.dtype) -> None:
    """Make the model compute in `dtype`, with the results of `model.to(dtype)`.

    Forward hooks cast the embedding, each layer, the final norm and the output layer before they
    run, and restore their tensors afterwards.
    """
    model.config.pipeline_dtype = dtype
    optional = [getattr(model, "embedding", None), getattr(model, "output_layer", None)]
    for module in [*optional, *model.decoder.layers, model.decoder.final_layernorm]:
        if module is not None:
            saved: SavedTensors = []
            module.register_forward_pre_hook(partial(_cast, saved, dtype))
            module.register_forward_hook(partial(_restore, saved), always_call=True)


def _cast(saved: SavedTensors, dtype: torch.dtype, module: torch.nn.Module, args: Any) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            saved.append((tensor, tensor.data))
            tensor.data = tensor.data.to(dtype)


def _restore(saved: SavedTensors, module: torch.nn.Module, args: Any, output: Any) -> None:
    for tensor, data in saved:
        tensor.data = data
    saved.clear()
