"""A KV cache that holds what a rounded one would give back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from nemo_vlm_ptq.reference.checkpoint import ReadKv
from nemo_vlm_ptq.reference.number_formats import fake_quantize_values


class FakeQuantizedCache(DynamicCache):
    """transformers' cache; keys, after their rotation, and values are rounded as they come in.

    Attention sees nothing but what is cached, also of the prompt.
    """

    def __init__(self, config: Any, kv: ReadKv) -> None:
        super().__init__(config=config)
        self.kv = kv

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values [B,kv heads,S,D] -> all of the layer, rounded."""
        key = fake_quantize_values(key_states, self.kv.rounding, self.kv.key[layer_idx])
        value = fake_quantize_values(value_states, self.kv.rounding, self.kv.value[layer_idx])
        return super().update(key, value, layer_idx, *args, **kwargs)
