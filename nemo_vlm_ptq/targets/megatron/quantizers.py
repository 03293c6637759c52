"""Insert modelopt's quantizers into a Megatron model and fill them with solved scales.

The result is a regular modelopt Megatron model. Only this module and quant_modules.py import
modelopt. Linears are selected by module identity instead of name patterns, and the enabled
quantizers are counted afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

import modelopt.torch.quantization as mtq
import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state
from modelopt.torch.quantization.nn import (
    QuantModuleRegistry,
    SequentialQuantizer,
    TensorQuantizer,
)

from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.calibrate.solve.scales import prepare_weight
from nemo_vlm_ptq.calibrate.statistics import ROW_PARALLEL, layer_linears
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat
from nemo_vlm_ptq.megatron.attention import SdpaCoreAttention, core_attention
from nemo_vlm_ptq.numerics import fake_quantize
from nemo_vlm_ptq.targets.megatron import quant_modules

ScalesLookup = Callable[[int, str], LinearScales]  # (layer, linear) -> scales of this rank's shard
KvAmaxLookup = Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # layer -> amax of key, value

# Quantizer config per number format of the KV cache; modelopt has no preset for int8.
KV_QUANTIZERS: dict[str, list[dict[str, Any]]] = {
    "fp8": mtq.FP8_KV_CFG["quant_cfg"],
    "int8": [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}}],
    "nvfp4": mtq.NVFP4_KV_CFG["quant_cfg"],
}


def preset_config(
    fmt: QuantFormat, group_size: int, kv_cache: KvCacheFormat | None = None
) -> dict[str, Any]:
    """Return a copy of modelopt's preset with the given group size and no calibration algorithm.

    A format that modelopt cannot fake-quantize (nf4) gets a config that disables all quantizers.
    """
    config: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}]}
    if fmt.modelopt_preset:
        config = copy.deepcopy(getattr(mtq, fmt.modelopt_preset))
    config["algorithm"] = None
    for quantizer in config["quant_cfg"]:
        cfg = quantizer.get("cfg")
        for part in cfg if isinstance(cfg, list) else [cfg]:
            if part and part.get("block_sizes", {}).get(-1) is not None:  # None: per token
                part["block_sizes"][-1] = fmt.group(group_size)
    if kv_cache is not None:
        config["quant_cfg"] += copy.deepcopy(KV_QUANTIZERS[kv_cache.number_format])
    return config


def insert_quantizers(
    model: GPTModel, fmt: QuantFormat, group_size: int, kv_cache: KvCacheFormat | None = None
) -> None:
    """Convert the linears into modelopt's quantized linears, without scales.

    With a KV cache format the core attentions are converted, too.
    """
    if not fmt.modelopt_preset and kv_cache is None:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # modelopt prints per rank
        if kv_cache is not None:
            # Only for this call: otherwise checkpoints without a quantized KV cache would contain
            # states of disabled quantizers.
            QuantModuleRegistry.register({SdpaCoreAttention: "SdpaCoreAttention"})(
                quant_modules.KvQuantAttention
            )
            stack.callback(QuantModuleRegistry.unregister, SdpaCoreAttention)
        mtq.quantize(model, preset_config(fmt, group_size, kv_cache))
    for block in model.decoder.layers:
        if core_attention(block) is None:  # linears of a DeltaNet stay in 16 bit
            for module in block.self_attention.modules():
                if isinstance(module, TensorQuantizer):
                    module.disable()
    if fmt.low_rank:
        for _, linear, module in decoder_linears(model):
            quant_modules.add_low_rank(module, linear)


def fill_quantizers(
    model: GPTModel,
    fmt: QuantFormat,
    get_scales: ScalesLookup,
    get_kv_amax: KvAmaxLookup | None = None,
) -> None:
    """Set the scales of all quantizers, and check which quantizers are enabled.

    Args:
        model: decoder with quantizers inserted.
        fmt: the format.
        get_scales: (layer, linear) -> scales of this rank's shard.
        get_kv_amax: layer -> amax [] of keys and of values; None without a KV cache format.

    Raises:
        UserError: the enabled quantizers are not those of the decoder's linears and KV cache.
    """
    expected = set()
    if fmt.modelopt_preset:
        for layer, linear, module in decoder_linears(model):
            _fill(module, get_scales(layer, linear))
            expected.add(id(module.weight_quantizer))
            if fmt.activation is not None:
                expected.add(id(module.input_quantizer))
    if get_kv_amax is not None:
        for block in model.decoder.layers:
            if (attention := core_attention(block)) is None:
                continue
            quantizers = cast(quant_modules.KvQuantAttention, attention).kv_quantizers()
            amaxes = get_kv_amax(block.layer_number - 1)
            for quantizer, amax in zip(quantizers, amaxes, strict=True):
                quantizer.amax = amax.reshape(()).to(next(block.parameters()).device)
                expected.add(id(quantizer))
    enabled = {id(quantizer) for quantizer in _top_level_quantizers(model) if quantizer.is_enabled}
    if enabled != expected:
        raise UserError(
            f"{fmt.name}: {len(enabled)} quantizers are enabled, expected {len(expected)}; this "
            "version of nvidia-modelopt quantizes other modules than the decoder's linears"
        )


def prepare_weights(
    model: GPTModel, fmt: QuantFormat, get_scales: ScalesLookup, layers: Collection[int]
) -> None:
    """Replace the weights of some layers by those that the weight quantizers round, in place.

    In a format without a weight quantizer (nf4) weights are fake-quantized instead.
    """
    linears = (linear for linear in decoder_linears(model) if linear[0] in layers)
    for layer, linear, module in linears:
        weight_OK = module.weight.data
        scales = get_scales(layer, linear).to(weight_OK.device)
        prepared_OK = prepare_weight(weight_OK, scales, fmt)
        if not fmt.modelopt_preset:
            prepared_OK = fake_quantize(prepared_OK, scales.weight_amax, fmt.weight)
        weight_OK.copy_(prepared_OK)


def use_custom_backends(model: GPTModel, fmt: QuantFormat) -> None:
    """Use the backends of quant_modules.py where modelopt's do not work or depend on the layout.

    These are NVFP4 on a CPU, and inputs of row-parallel linears with per-token scales, which
    modelopt computes from the shard of each tensor rank. Call this on a complete model: the backend
    is part of a quantizer's state, and a saved state must load without this package.
    """
    quant_modules.register_backends()
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            if isinstance(module, TensorQuantizer) and module.is_nvfp4_dynamic:
                module.backend = quant_modules.NVFP4_CPU_BACKEND
    if fmt.activation == "fp8_token":
        for _, linear, module in decoder_linears(model):
            if linear in ROW_PARALLEL:
                module.input_quantizer.backend = quant_modules.FP8_TOKEN_BACKEND


def disable_activation_quantizers(model: GPTModel) -> None:
    """Disable the quantizers of inputs, keys and values; pre_quant_scales stay active."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and "weight_quantizer" not in name:
            module.disable()


def decoder_linears(model: GPTModel) -> Iterator[tuple[int, str, Any]]:
    """Yield (global layer index, key in LINEARS, module) of the linears on this rank."""
    for block in model.decoder.layers:
        for linear, module in layer_linears(block).items():
            yield block.layer_number - 1, linear, module


def save_modelopt_state(model: GPTModel, folder: Path) -> None:
    """Save modelopt's state next to the weights, from which training tools restore the model."""
    save_sharded_modelopt_state([model], str(folder))


def _top_level_quantizers(model: GPTModel) -> list[Any]:
    """Return the quantizers that are not part of a SequentialQuantizer."""
    found: list[Any] = []
    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, SequentialQuantizer):
            inner.update(id(part) for part in module)
            found.append(module)
        elif isinstance(module, TensorQuantizer) and id(module) not in inner:
            found.append(module)
    return found


@torch.no_grad()
def _fill(module: Any, scales: LinearScales) -> None:
    weight_OK, device = module.weight, module.weight.device
    dtype = weight_OK.dtype
    if scales.pre_quant_scale is not None:
        module.input_quantizer._enable_pre_quant_scale = True
        module.input_quantizer.pre_quant_scale = scales.pre_quant_scale.to(device, dtype)
    if scales.input_amax is not None:
        module.input_quantizer.amax = scales.input_amax.to(device)
    if scales.low_rank_a is not None and scales.low_rank_b is not None:
        module.register_buffer("low_rank_a", scales.low_rank_a.to(device, dtype))
        module.register_buffer("low_rank_b", scales.low_rank_b.to(device, dtype))
    first, second = module.weight_quantizer, None
    if isinstance(first, SequentialQuantizer):
        first, second = first
    amax = scales.weight_amax.to(device)
    first.amax = amax if amax.dim() == 0 else amax.reshape(-1, 1)
    if amax.dim() == 2:
        first._setup_for_blockquant(weight_OK)  # completes the state before the first forward pass
    if second is not None and scales.weight_amax_2 is not None:
        second.amax = scales.weight_amax_2.to(device)
