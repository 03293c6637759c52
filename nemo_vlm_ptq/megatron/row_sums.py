"""Sums over tensor ranks as one rank makes them: added in float32, rounded once.

megatron-core rounds each rank's part of a row-parallel output to 16 bit and adds those. One rank
alone rounds the whole sum. What is observed should not tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear


@contextmanager
def row_sums_in_float32(model: GPTModel) -> Iterator[None]:
    """Inside this block parts of row-parallel outputs are float32 until they are added."""
    linears = [one for one in model.modules() if isinstance(one, RowParallelLinear)]
    handles = [linear.register_forward_hook(_rounded) for linear in linears]
    for linear in linears:
        linear._forward_impl = _part
    try:
        yield
    finally:
        for linear, handle in zip(linears, handles, strict=True):
            handle.remove()
            del linear._forward_impl


def _part(input: torch.Tensor, weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """x [S,B,K] -> x W^T [S,B,O] float32, from a rank's share of K."""
    if input.is_cuda and input.dtype != torch.float32:
        flat = torch.mm(input.flatten(0, 1), weight.T, out_dtype=torch.float32)
        return flat.unflatten(0, input.shape[:2])
    return input.float() @ weight.float().T


def _rounded(linear: Any, _: Any, out: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    return out[0].to(linear.weight.dtype), out[1]
