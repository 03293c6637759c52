"""Core attention through torch's scaled_dot_product_attention: the same code on CPU and GPU.

megatron-core's own DotProductAttention builds its mask on CUDA and forks the CUDA random state
even in evaluation, so it cannot run on a CPU; this one can, and is faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.dot_product_attention import DotProductAttention


class SdpaCoreAttention(DotProductAttention):
    """softmax(q k^T / sqrt(D)) v, causal, KV heads shared by query heads.

    `watch`, when set, is called with (key, value) of each forward, shapes [S,B,heads,D].
    """

    kv_observer: Any = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """query [S,B,heads,D], key and value [S,B,kv heads,D] -> [S,B,heads*D].

        attention_mask: None for plain causal attention, else [B,1,S,S] bool, True where hidden.
        """
        if self.kv_observer is not None:
            self.kv_observer(key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        visible = None if attention_mask is None else ~attention_mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
