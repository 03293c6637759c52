"""Linears dealt over tensor ranks by their outputs alone, so that each dot product is one rank's.

A row-parallel linear's output is a sum over tensor ranks, whose rounding and order depend on how
many there are. Here its weight is cut by outputs, as a column-parallel one's is, its input is
gathered, and its outputs are: tensor ranks compute the numbers of one rank. Ranks keep as many
weights, and send 1.4 times as much of a Llama's layer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region


class OutputShardedLinear(ColumnParallelLinear):
    """In place of a RowParallelLinear: takes a part of x [S,B,K/T], returns x W^T [S,B,O] whole.

    Hooks in front of it see x [S,B,K] whole.
    """

    def __init__(
        self, input_size: int, output_size: int, *, input_is_parallel: bool, **rest: Any
    ) -> None:
        assert input_is_parallel
        super().__init__(input_size, output_size, gather_output=True, **rest)
        self.register_forward_pre_hook(_gathered)  # the first of its hooks


def _gathered(linear: OutputShardedLinear, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    return (gather_from_tensor_model_parallel_region(args[0], group=linear.tp_group),)
