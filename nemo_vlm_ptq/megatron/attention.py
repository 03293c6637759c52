"""Core attention on torch's scaled_dot_product_attention, for CPU and GPU.

megatron-core's DotProductAttention creates its mask on CUDA and forks the CUDA RNG state even in
eval mode, so it does not run on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention

from nemo_vlm_ptq.families.decoder import AttentionShape


class SdpaCoreAttention(DotProductAttention):
    """Grouped-query attention softmax(scale q k^T) v.

    Attributes:
        kv_observer: called with the key and the value, [S,B,kv heads,D], of each forward pass.
        scale: factor of q k^T; None: 1 / sqrt(D).
        sliding_window: tokens that a token attends to, up to itself; None: all.
        is_causal: whether a token attends to none behind it, whatever the mask.
    """

    kv_observer: Callable[[torch.Tensor, torch.Tensor], Any] | None = None
    scale: float | None = None
    sliding_window: int | None = None
    is_causal: bool = False

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
        if keep is not None and self.is_causal:
            keep = keep.tril()
        if self.sliding_window is not None and self.sliding_window < q.shape[2]:
            keep = _in_window(q.shape[2], self.sliding_window, keep, q.device)
        if keep is not None and q.is_cuda:  # fused kernels take a mask, or fewer KV heads, not both
            repeats = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=keep, is_causal=keep is None, enable_gqa=True, scale=self.scale
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def core_attention(block: Any) -> SdpaCoreAttention | None:
    """Return the core attention of a Megatron transformer layer; None if it has no attention."""
    return getattr(block.self_attention, "core_attention", None)


def _in_window(
    length: int, window: int, keep: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return the mask [...,S,S] bool of what a window leaves of `keep`, or of causal attention."""
    if keep is None:
        keep = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return keep & torch.ones(length, length, dtype=torch.bool, device=device).triu(1 - window)


def _smaller_linear(
    build: Callable[..., Any], features: int, inputs: int, outputs: int, **kwargs: Any
) -> Any:
    """Build a linear with fewer output features than it is asked for."""
    return build(inputs, outputs - features, **kwargs)


class SlidingWindowSelfAttention(SelfAttention):
    """Self-attention of a model in which some layers have a sliding window.

    rotary_pos_emb is a pair: that of layers with full attention, and that of layers with a window.

    Args:
        config: config of the model.
        submodules: modules of the attention.
        shape: sizes of this layer.
        v_norm: see `Decoder`.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        *args: Any,
        shape: AttentionShape,
        v_norm: bool,
        **kwargs: Any,
    ) -> None:
        own = copy.copy(config)
        own.kv_channels, own.num_query_groups = shape.head_dim, shape.kv_heads
        if shape.v_from_k:
            values = shape.head_dim * shape.kv_heads
            linear = partial(_smaller_linear, submodules.linear_qkv, values)
            submodules = replace(submodules, linear_qkv=linear)
        super().__init__(own, submodules, *args, **kwargs)
        self.shape, self.v_norm = shape, v_norm

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return query [S,B,heads,D], key and value [S,B,kv heads,D] in front of rotation."""
        if self.shape.v_from_k:
            query, key, value = self._query_and_key(hidden_states)
        else:
            found: Any = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
            query, key, value = found
        if self.v_norm:
            eps = self.config.layernorm_epsilon
            value = F.rms_norm(value.float(), value.shape[-1:], eps=eps).to(value.dtype)
        return query, key, value

    def _query_and_key(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query and key, and the key in front of its norm."""
        mixed, _ = self.linear_qkv(hidden_states)
        heads = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1, self.shape.head_dim))
        query, value = heads[..., :-1, :].flatten(2, 3), heads[..., -1, :]
        key = value
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: list[torch.Tensor],
        **kwargs: Any,
    ) -> Any:
        """Compute attention."""
        full, sliding = rotary_pos_emb
        chosen = full if self.core_attention.sliding_window is None else sliding
        return super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=chosen, **kwargs
        )
