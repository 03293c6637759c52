"""Core attention on torch's scaled_dot_product_attention, for CPU and GPU.

megatron-core's DotProductAttention creates its mask on CUDA and forks the CUDA RNG state even in
eval mode, so it does not run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.dot_product_attention import DotProductAttention


class SdpaCoreAttention(DotProductAttention):
    """Grouped-query attention softmax(q k^T / sqrt(D)) v.

    Attributes:
        kv_observer: called with the key and the value, [S,B,kv heads,D], of each forward pass.
    """

    kv_observer: Callable[[torch.Tensor, torch.Tensor], Any] | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """Compute attention.

        Args:
            query: [S,B,heads,D].
            key: [S,B,kv heads,D].
            value: [S,B,kv heads,D].
            attention_mask: [B,1,S,S] bool, True where masked out; None: causal.

        Returns:
            [S,B,heads*D].
        """
        if self.kv_observer is not None:
            self.kv_observer(key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        keep = None if attention_mask is None else ~attention_mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=keep, is_causal=keep is None, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
