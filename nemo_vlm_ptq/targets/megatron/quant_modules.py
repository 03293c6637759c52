"""Quantized Megatron modules and quantization backends that modelopt 0.47 lacks.

* Tensor-parallel linears with SVDQuant's low-rank branch.
* SdpaCoreAttention with a quantized KV cache.
* NVFP4 on CPUs, where modelopt has no kernel.
* Per-token fp8 with one scale per token across tensor ranks.

Legend: S tokens, B samples, D head dimension, K input features, O output features, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from modelopt.torch.opt.dynamic import _DMRegistryCls
from modelopt.torch.quantization.nn import (
    QuantModule,
    TensorQuantizer,
    is_registered_quant_backend,
    register_quant_backend,
)
from modelopt.torch.quantization.tensor_quant import scaled_e4m3
from modelopt.torch.utils.distributed import ParallelState

from nemo_vlm_ptq.calibrate.statistics import ROW_PARALLEL
from nemo_vlm_ptq.numerics import fake_quantize_nvfp4

# Names in modelopt's registry of quantization backends.
NVFP4_CPU_BACKEND, FP8_TOKEN_BACKEND = "nvfp4_on_cpu", "fp8_token_across_ranks"
LOW_RANK_BUFFERS = ("low_rank_a", "low_rank_b")
LOW_RANK_REGISTRY = _DMRegistryCls("LowRank")  # quantized linear -> linear with low-rank branch


def add_low_rank(module: QuantModule, linear: str) -> None:
    """Convert a quantized linear into one with a low-rank branch, whose buffers are set later.

    Args:
        module: quantized tensor-parallel linear; its class is changed in place.
        linear: its key in LINEARS.
    """
    cls = type(module)
    if cls not in LOW_RANK_REGISTRY:
        LOW_RANK_REGISTRY.register({cls: cls.__name__})(LowRankLinear)
    LOW_RANK_REGISTRY.convert(module, linear=linear)


class LowRankLinear(QuantModule):
    """Quantized tensor-parallel linear with a 16 bit low-rank branch: y = Q(x) W_q^T + x a^T b^T.

    x is the input times pre_quant_scale. modelopt 0.47's SVDQuantLinear adds the branch to the
    output of the linear, which is a tuple in Megatron. Here it is added before the all-reduce over
    tensor ranks: row-parallel linears shard a along K, column-parallel linears shard b along O.
    """

    low_rank_a: torch.Tensor  # [r,K]
    low_rank_b: torch.Tensor  # [O,r]

    def _setup(self, linear: str) -> None:
        self.linear_name = linear

    @staticmethod
    def _quantized_linear_fn(
        package: Any, function: str, self: Any, input: Any, weight: Any, *args: Any, **kwargs: Any
    ) -> Any:
        quantized_linear = super(LowRankLinear, type(self))._quantized_linear_fn
        output = quantized_linear(package, function, self, input, weight, *args, **kwargs)
        x = input * self.input_quantizer.pre_quant_scale
        return output + F.linear(F.linear(x, self.low_rank_a), self.low_rank_b)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the sharded state dict of the linear, including its low-rank branch."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        axes = {"low_rank_a": 1} if self.linear_name in ROW_PARALLEL else {"low_rank_b": 0}
        branch = {name: self.get_buffer(name) for name in LOW_RANK_BUFFERS}
        state |= make_sharded_tensors_for_checkpoint(branch, prefix, axes, sharded_offsets)
        if self.linear_name == "linear_fc1":  # gate and up are sharded separately, as in the weight
            key, singleton = f"{prefix}low_rank_b", bool(metadata["singleton_local_shards"])
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, singleton)
        return state


class KvQuantAttention(QuantModule):
    """SdpaCoreAttention that quantizes keys and values as a quantized KV cache does.

    Quantizer names and states are those of modelopt 0.47's _QuantTEDotProductAttention, so that a
    model with TransformerEngine's attention can restore them.
    """

    def _setup(self) -> None:
        self.k_bmm_quantizer, self.v_bmm_quantizer = TensorQuantizer(), TensorQuantizer()
        self.parallel_state = ParallelState(
            parallel_state.get_data_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
        )

    def kv_quantizers(self) -> tuple[TensorQuantizer, TensorQuantizer]:
        """Return the quantizers of keys and of values."""
        return self.k_bmm_quantizer, self.v_bmm_quantizer

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute attention; query [S,B,heads,D], key and value [S,B,kv heads,D], after RoPE."""
        key, value = self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        return super().forward(query, key, value, *args, **kwargs)

    def get_extra_state(self) -> None:
        """Declare extra state for torch, which checks the class; modelopt patches the instance."""

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Move restored buffers to the device and dtype of the attention's parameters.

        modelopt's `megatron_replace_quant_module_hook` sets both attributes.
        """
        self.to(device=self.device, dtype=self.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the scalar amaxes of the quantizers, replicated over tensor ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


def register_backends() -> None:
    """Register the quantization backends of this module with modelopt, once."""
    backends = {NVFP4_CPU_BACKEND: _quantize_nvfp4, FP8_TOKEN_BACKEND: _quantize_fp8_token}
    for name, backend in backends.items():
        if not is_registered_quant_backend(name):
            register_quant_backend(name, backend)


def _quantize_nvfp4(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    return fake_quantize_nvfp4(inputs, quantizer._get_amax(inputs).amax())


def _quantize_fp8_token(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """Fake-quantize per token, with the amax over the shards of all tensor ranks."""
    amax = quantizer._get_amax(inputs).clone()
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
    return scaled_e4m3(inputs, amax, None, 4, 3)
