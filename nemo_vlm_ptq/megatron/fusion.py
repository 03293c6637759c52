"""Replace two chains of elementwise operations of megatron-core by fused kernels on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import attention, mlp

_angles: tuple[Any, float, torch.Tensor, torch.Tensor] | None = None  # of the last frequencies


def use_fused_kernels() -> None:
    """Install the kernels; tensors that they do not support take megatron-core's own code.

    A model uses the kernel of its MLP if `bias_activation_fusion` is set in its config.
    """
    attention.apply_rotary_pos_emb = _rotate
    mlp.bias_swiglu_impl = _gated_silu


def _rotate(
    t: torch.Tensor,
    freqs: torch.Tensor,
    config: Any,
    cu_seqlens: torch.Tensor | None = None,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> torch.Tensor:
    """Apply rotary position embeddings; t [S,B,heads,D], freqs [S,1 or B,1,D] float32."""
    fused = t.is_cuda and t.dtype != torch.float32 and cu_seqlens is None
    if not fused or freqs.shape[2:] != (1, t.shape[-1]) or t.stride(-1) != 1:
        rotated: torch.Tensor = apply_rotary_pos_emb(
            t, freqs, config=config, cu_seqlens=cu_seqlens, mscale=mscale, cp_group=cp_group
        )
        return rotated
    from nemo_vlm_ptq.megatron import kernels

    cos_ND, sin_ND = _cos_and_sin(freqs, mscale, t.dtype)
    return kernels.rotate(t, cos_ND, sin_ND)


def _cos_and_sin(
    freqs: torch.Tensor, mscale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine [N,D] of frequencies, which all layers share."""
    global _angles
    if _angles is None or _angles[0] is not freqs or _angles[1] != mscale:
        angles_ND = freqs.flatten(0, 2)
        cos_ND, sin_ND = (
            (function(angles_ND) * mscale).to(dtype).contiguous()
            for function in (torch.cos, torch.sin)
        )
        _angles = freqs, mscale, cos_ND, sin_ND
    return _angles[2], _angles[3]


def _gated_silu(x: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """Return silu(gate) * up of x = [gate | up], [S,B,2F]; without bias."""
    assert bias is None, "linears have no bias"
    from nemo_vlm_ptq.megatron import kernels

    return kernels.gated_silu(x.flatten(0, 1)).unflatten(0, x.shape[:2])
