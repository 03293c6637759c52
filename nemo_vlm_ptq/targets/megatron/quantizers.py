"""Solved scales into modelopt's quantizers: the result is an ordinary modelopt Megatron model.

This file and modules.py alone import modelopt. Presets are copied, never edited. What is quantized
is chosen by module identity, and the enabled quantizers are counted afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state
from modelopt.torch.quantization.nn import (
    QuantModuleRegistry,
    SequentialQuantizer,
    TensorQuantizer,
)

from megatron.core.models.gpt import GPTModel
from nemo_vlm_ptq.calibrate.solve.scales import (
    LinearScales,
    divide_by_pre_quant_scale,
    residual_weight,
)
from nemo_vlm_ptq.calibrate.statistics import LINEARS, ROW_PARALLEL
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat
from nemo_vlm_ptq.megatron.attention import SdpaCoreAttention
from nemo_vlm_ptq.numerics import fake_quantize, nudge_off_ties
from nemo_vlm_ptq.targets.megatron import quant_modules as modules

ScalesOf = Callable[[int, str], LinearScales]
KvOf = Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # layer -> amax [] of keys, of values

# A KV cache's quantizers by kind of number; modelopt has no preset for int8.
KV_QUANTIZERS: dict[str, list[dict[str, Any]]] = {
    "fp8": mtq.FP8_KV_CFG["quant_cfg"],
    "int8": [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}}],
    "nvfp4": mtq.NVFP4_KV_CFG["quant_cfg"],
}


def preset(row: QuantFormat, group: int, kv: KvCacheFormat | None = None) -> dict[str, Any]:
    """modelopt's preset of a format with our group size, and no calibration algorithm.

    A format that modelopt cannot fake-quantize (nf4) gets one that leaves every linear alone.
    """
    config: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}]}
    if row.modelopt_preset:
        config = copy.deepcopy(getattr(mtq, row.modelopt_preset))
    config["algorithm"] = None
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg")
        for part in cfg if isinstance(cfg, list) else [cfg]:
            if part and part.get("block_sizes", {}).get(-1) is not None:  # None: a whole token
                part["block_sizes"][-1] = row.group(group)
    if kv is not None:
        config["quant_cfg"] += copy.deepcopy(KV_QUANTIZERS[kv.kind])
    return config


def insert_quantizers(
    model: GPTModel, row: QuantFormat, group: int, kv: KvCacheFormat | None = None
) -> None:
    """Replace the model's linears by modelopt's, with the quantizers of the format, unfilled.

    With a KV cache format the core attentions are replaced too.
    """
    if not row.modelopt_preset and kv is None:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # it prints a line a rank
        if kv is not None:  # for this call: elsewhere a checkpoint would hold states of no use
            QuantModuleRegistry.register({SdpaCoreAttention: "SdpaCoreAttention"})(
                modules.KvAttention
            )
            stack.callback(QuantModuleRegistry.unregister, SdpaCoreAttention)
        mtq.quantize(model, preset(row, group, kv))
    if row.low_rank:
        for _, name, module in _linears(model):
            modules.add_low_rank(module, name)


def fill_quantizers(
    model: GPTModel, row: QuantFormat, scales_of: ScalesOf, kv_of: KvOf | None = None
) -> None:
    """Give the quantizers their scales, and count them.

    Args:
        model: decoder with quantizers inserted.
        row: the format.
        scales_of: (layer, linear) -> scales cut to this rank's shard.
        kv_of: layer -> largest magnitudes [] of keys and of values; None without a KV cache format.

    Raises:
        UserError: the enabled quantizers are not just those of the decoder's linears and KV cache.
    """
    expected = set()
    if row.modelopt_preset:
        for layer, name, module in _linears(model):
            _fill(module, scales_of(layer, name))
            expected.add(id(module.weight_quantizer))
            if row.activation is not None:
                expected.add(id(module.input_quantizer))
    if kv_of is not None:
        for block in model.decoder.layers:
            core = block.self_attention.core_attention
            pairs = zip(core.quantizers(), kv_of(block.layer_number - 1), strict=True)
            for quantizer, amax in pairs:
                quantizer.amax = amax.reshape(()).to(next(block.parameters()).device)
                expected.add(id(quantizer))
    enabled = {id(q) for q in _outer_quantizers(model) if q.is_enabled}
    if enabled != expected:
        raise UserError(
            f"{row.name}: {len(enabled)} quantizers are enabled, {len(expected)} were expected; "
            "this version of nvidia-modelopt quantizes other modules than the decoder's linears"
        )


def prepare_weights(
    model: GPTModel, row: QuantFormat, scales_of: ScalesOf, layers: Collection[int]
) -> None:
    """Make each weight of some layers the one that is rounded, in place.

    It is divided by its prequant scale, loses what its branch computes, and is moved off ties. A
    format without a quantizer (nf4) leaves the rounded weight itself.
    """
    own = (one for one in _linears(model) if one[0] in layers)
    for layer, name, module in own:
        weight = module.weight.data
        scales = _on(scales_of(layer, name), weight.device)
        rest = residual_weight(
            divide_by_pre_quant_scale(weight, scales.pre_quant_scale), scales.branch
        )
        if row.modelopt_preset:
            weight.copy_(nudge_off_ties(rest, scales.weight_amax, row.weight))
        else:
            weight.copy_(fake_quantize(rest, scales.weight_amax, row.weight))


def use_custom_backends(model: GPTModel, row: QuantFormat) -> None:
    """Round with our code where modelopt cannot (nvfp4 on a CPU), or would on each rank for itself.

    That is the input of a row-parallel linear with a scale a token: modelopt makes the scale from
    the rank's part of the token. Call this on a complete model: the name of a backend belongs to a
    quantizer's state, and a saved state must not ask others for ours.
    """
    modules.register_backends()
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            if isinstance(module, TensorQuantizer) and module.is_nvfp4_dynamic:
                module.backend = modules.NVFP4_ON_CPU
    if row.activation == "fp8_token":
        for _, name, module in _linears(model):
            if name in ROW_PARALLEL:
                module.input_quantizer.backend = modules.WHOLE_TOKENS


def disable_activation_quantizers(model: GPTModel) -> None:
    """Switch off what rounds inputs, keys and values; prequant scales stay."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and "weight_quantizer" not in name:
            module.disable()


def _on(scales: LinearScales, device: torch.device) -> LinearScales:
    moved: dict[str, Any] = {key: one.to(device) for key, one in scales.tensors().items()}
    return replace(scales, **moved)


def _linears(model: GPTModel) -> Iterator[tuple[int, str, Any]]:
    """(layer over the whole model, name, module) of the linears on this rank."""
    for block in model.decoder.layers:
        for name, path in LINEARS.items():
            yield block.layer_number - 1, name, block.get_submodule(path)


def _outer_quantizers(model: GPTModel) -> list[Any]:
    """Quantizers that stand for themselves, not as a part of a sequence."""
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
    weight, device = module.weight, module.weight.device
    if scales.pre_quant_scale is not None:
        module.input_quantizer._enable_pre_quant_scale = True
        module.input_quantizer.pre_quant_scale = scales.pre_quant_scale.to(device, weight.dtype)
    if scales.input_amax is not None:
        module.input_quantizer.amax = scales.input_amax.to(device)
    if scales.low_rank_a is not None and scales.low_rank_b is not None:
        module.register_buffer("low_rank_a", scales.low_rank_a.to(device, weight.dtype))
        module.register_buffer("low_rank_b", scales.low_rank_b.to(device, weight.dtype))
    first, second = module.weight_quantizer, None
    if isinstance(first, SequentialQuantizer):
        first, second = first
    amax = scales.weight_amax.to(device)
    first.amax = amax if amax.dim() == 0 else amax.reshape(-1, 1)
    if amax.dim() == 2:
        first._setup_for_blockquant(weight)  # so that state is complete before the first forward
    if second is not None and scales.weight_amax_2 is not None:
        second.amax = scales.weight_amax_2.to(device)


def save_modelopt_state(model: GPTModel, folder: Path) -> None:
    """modelopt's own state beside the weights, so that training tools can restore the model."""
    save_sharded_modelopt_state([model], str(folder))
