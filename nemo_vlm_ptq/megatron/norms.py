"""Norms that megatron-core's local layers lack: zero-centered RMSNorm, and norms of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm x / rms(x) * (1 + weight), computed in float32 and rounded once, as in Gemma."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x [...,hidden_size]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class PostNormAdd(nn.Module):
    """Normalize an output and add the residual, in place of megatron-core's bias-dropout-add.

    Args:
        name: name of the norm, under which its weight is stored.
        norm: class of the norm.
        config: config of the model.
        has_scalar: whether the sum is multiplied by a number, the parameter layer_scalar.
    """

    def __init__(self, name: str, norm: Any, config: Any, *, has_scalar: bool = False) -> None:
        super().__init__()
        self.name = name
        self.layer_scalar = nn.Parameter(torch.empty(1)) if has_scalar else None
        self.add_module(name, norm(config, config.hidden_size, config.layernorm_epsilon))

    def forward(self, *_: Any) -> Callable[..., torch.Tensor]:
        """Return the function of (output, bias), residual and dropout; the last is ignored."""
        norm = self.get_submodule(self.name)

        def add(output: tuple[torch.Tensor, Any], residual: torch.Tensor, _: Any) -> torch.Tensor:
            added: torch.Tensor = residual + norm(output[0])
            return added if self.layer_scalar is None else added * self.layer_scalar

        return add
