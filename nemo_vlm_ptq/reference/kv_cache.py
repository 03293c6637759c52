"""KV cache of the reference model, fake-quantized or not."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from nemo_vlm_ptq.reference.checkpoint import ReadKvCache
from nemo_vlm_ptq.reference.number_formats import fake_quantize_values


class FakeQuantizedCache(DynamicCache):
    """KV cache of transformers that fake-quantizes keys, after rotary embedding, and values.

    `update` returns the quantized states, so attention reads them during prefill too.
    """

    def __init__(self, config: Any, kv: ReadKvCache) -> None:
        super().__init__(config=config)
        self.kv = kv
        kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        with_attention = [i for i, kind in enumerate(kinds) if kind != "linear_attention"]
        self.position = {layer: position for position, layer in enumerate(with_attention)}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value states [B,kv_heads,S,head_dim]; return all states of the layer."""
        number_format, position = self.kv.number_format, self.position[layer_idx]
        key = fake_quantize_values(key_states, number_format, self.kv.key_scale[position])
        value = fake_quantize_values(value_states, number_format, self.kv.value_scale[position])
        return super().update(key, value, layer_idx, *args, **kwargs)


def make_cache(config: Any, kv: ReadKvCache | None) -> DynamicCache:
    """Create an empty cache for a text config, fake-quantized with scales `kv`."""
    return DynamicCache(config=config) if kv is None else FakeQuantizedCache(config, kv)
