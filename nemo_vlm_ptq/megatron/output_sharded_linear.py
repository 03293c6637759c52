"""Output-sharded replacement of RowParallelLinear, whose numerics do not depend on the TP size.

The output of a row-parallel linear is a sum over tensor ranks, so rounding and summation order
depend on the TP size. Here the weight is sharded along its output dimension instead, and input and
output are all-gathered: every dot product is computed by one rank, as with TP 1. Weight memory per
rank is unchanged; communication per Llama layer is 1.4 times as much.

Legend: S tokens, B samples, K input features, O output features, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region


class OutputShardedLinear(ColumnParallelLinear):
    """Drop-in for RowParallelLinear: sharded x [S,B,K/T] -> full x W^T [S,B,O].

    Forward pre-hooks registered later receive the full x [S,B,K].
    """

    def __init__(
        self, input_size: int, output_size: int, *, input_is_parallel: bool, **kwargs: Any
    ) -> None:
        assert input_is_parallel
        super().__init__(input_size, output_size, gather_output=True, **kwargs)
        self.register_forward_pre_hook(_gather_input)  # runs before all hooks registered later


def _gather_input(
    linear: OutputShardedLinear, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor]:
    return (gather_from_tensor_model_parallel_region(args[0], group=linear.tp_group),)
