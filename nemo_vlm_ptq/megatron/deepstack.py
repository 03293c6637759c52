"""DeepStack: features of several tower layers, added to the image tokens behind the first layers.

Legend: S tokens, B samples, H hidden size, n image tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel


def add_deepstack(model: GPTModel, layers: int) -> None:
    """Let the first layers of a model add what `set_deepstack` gives before each forward pass."""
    assert len(model.decoder.layers) >= layers, "the window ends within the deepstack"
    model.deepstack = None
    for index, block in enumerate(model.decoder.layers[:layers]):
        block.register_forward_hook(_make_hook(model, index))


def set_deepstack(
    model: GPTModel, positions: torch.Tensor | None, features: torch.Tensor | None
) -> None:
    """Set what is added in the next forward pass.

    Args:
        model: a model with deepstack.
        positions: [n] int64, of the image tokens in [S,B] order; None without images.
        features: [n,layers*H], in the order of the layers; None without images.
    """
    model.deepstack = None
    if features is not None and positions is not None:
        model.deepstack = positions, features.split(model.config.hidden_size, dim=1)


def _make_hook(model: GPTModel, index: int) -> Any:
    def hook(_: Any, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any] | None:
        if model.deepstack is None:
            return None
        positions, features = model.deepstack
        states, *rest = output
        added = states.clone(memory_format=torch.contiguous_format)
        added.flatten(0, 1).index_add_(0, positions, features[index].to(added.dtype))
        return added, *rest

    return hook
