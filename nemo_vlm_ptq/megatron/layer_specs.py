"""Modules of each layer of a decoder: megatron-core's own, and those that it lacks."""

from __future__ import annotations

from collections.abc import Iterable

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from nemo_vlm_ptq.families.decoder import LAYER_SCALAR, Decoder
from nemo_vlm_ptq.families.llama import POST_NORMS
from nemo_vlm_ptq.megatron.attention import SdpaCoreAttention, SlidingWindowSelfAttention
from nemo_vlm_ptq.megatron.norms import PostNormAdd, ZeroCenteredRMSNorm
from nemo_vlm_ptq.megatron.output_sharded_linear import OutputShardedLinear


def block_spec(
    decoder: Decoder, config: TransformerConfig, layers: Iterable[int], *, for_calibration: bool
) -> TransformerBlockSubmodules:
    """Return the modules of some layers, and the final norm.

    Args:
        decoder: what the layers are made of.
        config: config of the model.
        layers: indices in the whole model.
        for_calibration: see `build_decoder`.
    """
    specs = [_layer_spec(decoder, config, i, for_calibration=for_calibration) for i in layers]
    norm = ZeroCenteredRMSNorm if decoder.zero_centered_norms else WrappedTorchNorm
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer_spec(
    decoder: Decoder, config: TransformerConfig, index: int, *, for_calibration: bool
) -> ModuleSpec:
    """Return the modules of a layer."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=decoder.qk_norm)
    layer = spec.submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    attention.core_attention = SdpaCoreAttention
    if for_calibration:
        attention.linear_proj = mlp.linear_fc2 = OutputShardedLinear
    if decoder.sliding_window is not None:
        layer.self_attention.module = SlidingWindowSelfAttention
        layer.self_attention.params |= {
            "shape": decoder.attention(index),
            "v_norm": decoder.v_norm,
        }
    if decoder.zero_centered_norms:
        layer.input_layernorm = layer.pre_mlp_layernorm = ZeroCenteredRMSNorm
        if decoder.qk_norm:
            attention.q_layernorm = attention.k_layernorm = ZeroCenteredRMSNorm
    if decoder.post_norms:
        norm = ZeroCenteredRMSNorm if decoder.zero_centered_norms else WrappedTorchNorm
        for name in POST_NORMS:
            place, _, norm_name = name.partition(".")
            params = {"name": norm_name, "norm": norm, "config": config}
            params["has_scalar"] = decoder.layer_scalar and LAYER_SCALAR.startswith(place)
            setattr(layer, place, ModuleSpec(module=PostNormAdd, params=params))
    if decoder.delta_net is not None and decoder.delta_net.layers[index]:
        from nemo_vlm_ptq.megatron.delta_net import GatedDeltaNet

        params = {"delta_net": decoder.delta_net}
        layer.self_attention = ModuleSpec(module=GatedDeltaNet, params=params)
    return spec
