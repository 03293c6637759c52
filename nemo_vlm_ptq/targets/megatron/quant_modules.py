"""What modelopt 0.47 does not have for Megatron: modules and roundings for its own registries.

SVDQuant's branch in tensor-parallel linears; rounded keys and values in our core attention; nvfp4
on a CPU, where modelopt has no kernel; a scale a token that tensor ranks share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from modelopt.torch.opt.dynamic import _DMRegistryCls
from modelopt.torch.quantization.nn import (
    QuantModule,
    TensorQuantizer,
    is_registered_quant_backend,
    register_quant_backend,
)
from modelopt.torch.quantization.tensor_quant import scaled_e4m3
from modelopt.torch.utils.distributed import ParallelState

from megatron.core import parallel_state
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo_vlm_ptq.calibrate.statistics import ROW_PARALLEL
from nemo_vlm_ptq.numerics import fake_quantize_nvfp4

NVFP4_ON_CPU, WHOLE_TOKENS = "nvfp4_on_cpu", "fp8_whole_tokens"  # in modelopt's table of backends
LOW_RANK_BUFFERS = ("low_rank_a", "low_rank_b")
LOW_RANK_REGISTRY = _DMRegistryCls("LowRank")  # modelopt's linears -> theirs with a branch


def add_low_rank(module: QuantModule, linear: str) -> None:
    """Make modelopt's tensor-parallel linear one with a branch, which is to be given to it.

    Args:
        module: a linear with quantizers; its class is changed in place.
        linear: its name in LINEARS.
    """
    kind = type(module)
    if kind not in LOW_RANK_REGISTRY:
        LOW_RANK_REGISTRY.register({kind: kind.__name__})(LowRankLinear)
    LOW_RANK_REGISTRY.convert(module, linear=linear)


class LowRankLinear(QuantModule):
    """modelopt's tensor-parallel linear with a 16 bit branch: y = Q(x) W_q^T + x a^T b^T.

    x is the input times its prequant scale. modelopt 0.47's SVDQuantLinear adds the branch to what
    the linear returns, which is a tuple in Megatron. Here it joins the product before the sum over
    tensor ranks: a row-parallel linear holds the columns of a that go with its part of x, a
    column-parallel one its rows of b.
    """

    low_rank_a: torch.Tensor  # [r,K]
    low_rank_b: torch.Tensor  # [O,r]

    def _setup(self, linear: str) -> None:
        self.linear_name = linear

    @staticmethod
    def _quantized_linear_fn(
        package: Any, function: str, self: Any, input: Any, weight: Any, *args: Any, **kwargs: Any
    ) -> Any:
        plain = super(LowRankLinear, type(self))._quantized_linear_fn
        product = plain(package, function, self, input, weight, *args, **kwargs)
        x = input * self.input_quantizer.pre_quant_scale
        return product + F.linear(F.linear(x, self.low_rank_a), self.low_rank_b)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The linear's shards, and those of the branch."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        axes = {"low_rank_a": 1} if self.linear_name in ROW_PARALLEL else {"low_rank_b": 0}
        branch = {name: self.get_buffer(name) for name in LOW_RANK_BUFFERS}
        state |= make_sharded_tensors_for_checkpoint(branch, prefix, axes, sharded_offsets)
        if self.linear_name == "linear_fc1":  # gate and up are cut apart, as in the weight
            key, alone = f"{prefix}low_rank_b", bool(metadata["singleton_local_shards"])
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, alone)
        return state


class KvAttention(QuantModule):
    """Our core attention with keys and values rounded as a KV cache holds them.

    Names and states are those of modelopt 0.47's _QuantTEDotProductAttention, so that a model with
    TransformerEngine's attention restores them.
    """

    def _setup(self) -> None:
        self.k_bmm_quantizer, self.v_bmm_quantizer = TensorQuantizer(), TensorQuantizer()
        self.parallel_state = ParallelState(
            parallel_state.get_data_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
        )

    def quantizers(self) -> tuple[TensorQuantizer, TensorQuantizer]:
        """Of keys, and of values."""
        return self.k_bmm_quantizer, self.v_bmm_quantizer

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """query [S,B,heads,D], key and value [S,B,kv heads,D] after RoPE."""
        key, value = self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        return super().forward(query, key, value, *args, **kwargs)

    def get_extra_state(self) -> None:
        """Torch asks for extra state if the class can give it; modelopt gives it by instance."""

    def set_extra_state(self, state: Any) -> None:
        """See get_extra_state."""

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Restored buffers come without a device; `megatron_replace_quant_module_hook` set ours."""
        self.to(device=self.device, dtype=self.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Scalars, the same on every tensor rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


def register_backends() -> None:
    """Make our two roundings known to modelopt by name, once."""
    for name, entry in ((NVFP4_ON_CPU, _round_nvfp4), (WHOLE_TOKENS, _round_whole_tokens)):
        if not is_registered_quant_backend(name):
            register_quant_backend(name, entry)


def _round_nvfp4(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    return fake_quantize_nvfp4(inputs, quantizer._get_amax(inputs).amax())


def _round_whole_tokens(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """fp8 with one scale a token, however many tensor ranks hold a part of it."""
    amax = quantizer._get_amax(inputs).clone()
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
    return scaled_e4m3(inputs, amax, None, 4, 3)
