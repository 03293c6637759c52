"""Solved scales into modelopt's quantizers: the result is an ordinary modelopt Megatron model.

The only file that imports modelopt. Presets are copied, never edited. What is quantized is chosen
by module identity, and the enabled quantizers are counted afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

from nemo_vlm_ptq.calibrate.scales import LinearScales, divide
from nemo_vlm_ptq.calibrate.statistics import LINEARS
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.numerics import off_ties

ScalesOf = Callable[[int, str], LinearScales]


def preset(row: QuantFormat, group: int) -> dict[str, Any]:
    """modelopt's preset of a format with our group size, and no calibration algorithm."""
    config = copy.deepcopy(getattr(mtq, row.modelopt_preset))
    config["algorithm"] = None
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg")
        for part in cfg if isinstance(cfg, list) else [cfg]:
            if part and "block_sizes" in part:
                part["block_sizes"][-1] = group
    return config


def insert_quantizers(model: GPTModel, row: QuantFormat, group: int) -> None:
    """Replace the model's linears by modelopt's, with the quantizers of the format, unfilled."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line a rank
        mtq.quantize(model, preset(row, group))


def fill_quantizers(model: GPTModel, row: QuantFormat, scales_of: ScalesOf) -> None:
    """Give the quantizers their scales, and count them.

    Args:
        model: decoder with quantizers inserted.
        row: the format.
        scales_of: (layer, linear) -> scales cut to this rank's shard.

    Raises:
        UserError: the enabled quantizers are not just those of the decoder's linears.
    """
    expected = set()
    for layer, name, module in _linears(model):
        _fill(module, scales_of(layer, name))
        expected.add(id(module.weight_quantizer))
        if row.activation is not None:
            expected.add(id(module.input_quantizer))
    enabled = {id(q) for q in _outer_quantizers(model) if q.is_enabled}
    if enabled != expected:
        raise UserError(
            f"{row.name}: {len(enabled)} quantizers are enabled, {len(expected)} were expected; "
            "this version of nvidia-modelopt quantizes other modules than the decoder's linears"
        )


def prepare_weights(model: GPTModel, row: QuantFormat, scales_of: ScalesOf) -> None:
    """Divide each weight by its prequant scale, and move it off ties, in place."""
    for layer, name, module in _linears(model):
        scales, weight = scales_of(layer, name), module.weight.data
        if scales.prequant is not None:
            weight.copy_(divide(weight, scales.prequant.to(weight.device)))
        weight.copy_(off_ties(weight, scales.weight_amax.to(weight.device), row.weight))


def stop_rounding_activations(model: GPTModel) -> None:
    """Switch the input quantizers off; their prequant scales stay."""
    for _, _, module in _linears(model):
        module.input_quantizer.disable()


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
    if scales.prequant is not None:
        module.input_quantizer._enable_pre_quant_scale = True
        module.input_quantizer.pre_quant_scale = scales.prequant.to(device, weight.dtype)
    if scales.input_amax is not None:
        module.input_quantizer.amax = scales.input_amax.to(device)
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
