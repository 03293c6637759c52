"""Describe a plan as text: what is read, what a rank holds, and what is written."""

from __future__ import annotations

import math

from nemo_vlm_ptq.checkpoints.huggingface import total_bytes
from nemo_vlm_ptq.planning.constraints import calibration_tensor_sizes
from nemo_vlm_ptq.planning.forecast import (
    bytes_per_parameter,
    full_model_bytes,
    layer_statistics_bytes,
    layer_weight_bytes,
    linear_parameters,
    rank_parameters,
    used_tensor_names,
    vision_parameters,
)
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.planning.windows import plan_windows, window_bytes

ENCODED_LAYERS = 5  # layers in host memory while an export is written: encoded ahead, and written


def describe_plan(plan: Plan, memory: int | None, data: int, layout_reason: str = "") -> str:
    """Return the plan as text.

    Args:
        plan: a plan with a resolved layout; only the data-parallel size may be `auto`.
        memory: bytes of a rank's GPU; None without one.
        data: data-parallel size.
        layout_reason: why the layout was chosen; printed after it.
    """
    recipe, decoder = plan.recipe, plan.decoder
    kv_heads = " and ".join(map(str, decoder.kv_head_counts))
    parallel, total = recipe.parallel, total_parameters(plan)
    lines = [
        f"model      {plan.folder}  ({plan.family.name}, {total / 1e6:,.1f} M parameters, "
        f"{total_bytes(plan.tensors) / 1e6:,.1f} MB, {plan.dtype})",
        f"decoder    {decoder.layers} layers, hidden {decoder.hidden}, {decoder.heads} heads, "
        f"{kv_heads} KV heads, MLP {decoder.ffn}, vocabulary {decoder.vocab}",
        f"calibrate  TP {parallel.tensor} x PP {parallel.pipeline} x "
        f"DP {parallel.data}{': ' + layout_reason if layout_reason else ''}",
        *_describe_tensor_sizes(plan),
    ]
    lines += _describe_windows(plan, memory, data)
    written = 0.0
    for fmt in plan.formats:
        targets = plan.targets(fmt)
        sizes = [target_bytes(plan, fmt.bits, target) for target in targets]
        written += sum(sizes)
        line = (
            f"{fmt.name:14} -> {', '.join(targets)}: about {sizes[0] / 1e6:,.1f} MB, "
            f"{sizes[0] / (2 * total):.2f} of 16 bit"
        )
        export = recipe.export
        serving_layout = f"; TensorRT-LLM ranks: TP {export.tensor} x PP {export.pipeline}"
        lines.append(line + serving_layout * ("trtllm" in targets))
    return "\n".join([*lines, _describe_16_bit(plan, total), _describe_written(plan, written)])


def total_parameters(plan: Plan) -> int:
    """Return the parameters in use: decoder, vision tower and projector."""
    return sum(math.prod(plan.tensors[name].shape) for name in used_tensor_names(plan))


def target_bytes(plan: Plan, bits: float, target: str) -> float:
    """Return about how many bytes a target writes; a Megatron checkpoint stays in 16 bit."""
    total, linear = total_parameters(plan), linear_parameters(plan)
    if target in ("megatron", "nemo"):
        return float(bytes_per_parameter(plan) * total)
    return linear * bits / 8 + bytes_per_parameter(plan) * (total - linear)


def _describe_tensor_sizes(plan: Plan) -> list[str]:
    """Return one line per supported tensor size: the memory of a rank without pipeline stages."""
    vision, width, lines = vision_parameters(plan), bytes_per_parameter(plan), []
    for tensor in calibration_tensor_sizes(plan):
        decoder = rank_parameters(plan, tensor)
        least = window_bytes(plan, tensor, 1, 1)
        lines.append(
            f"           TP {tensor:<2} {decoder / 1e6:>9,.1f} M parameters per rank, "
            f"{decoder * width / 1e6:>9,.1f} MB; tower and projector {vision * width / 1e6:,.1f} "
            f"MB; observe from {least / 1e9:,.1f} GB"
        )
    return lines


def _describe_windows(plan: Plan, memory: int | None, data: int) -> list[str]:
    """Return the windows, the peak of device and host memory, and where hidden states stand."""
    tensor, pipeline = (
        int(n) for n in (plan.recipe.parallel.tensor, plan.recipe.parallel.pipeline)
    )
    host = ENCODED_LAYERS * layer_weight_bytes(plan, 1)
    if memory is None:
        own = plan.decoder.layers // pipeline
        one, all_layers = (window_bytes(plan, tensor, pipeline, n) / 1e9 for n in (1, own))
        return [
            f"windows    from {one:,.1f} GB of a rank's memory for the smallest window to "
            f"{all_layers:,.1f} GB for all at once"
        ]
    windows = plan_windows(plan, tensor, pipeline, data, memory)
    size, states = "all layers at once", ""
    if windows.count > 1:
        size = f"{windows.count} of {windows.size} layers"
        elsewhere = windows.states_bytes - windows.states_on_device
        states = f"; hidden states {windows.states_bytes / 1e9:,.1f} GB"
        states += f", {elsewhere / 1e9:,.1f} GB of them on the host or in a file" * (elsewhere > 0)
        host += elsewhere
    device = windows.device_bytes + windows.states_on_device
    return [
        f"windows    {size}: up to {device / 1e9:,.1f} GB of a rank's GPU, "
        f"{host / 1e9:,.1f} GB of host memory{states}"
    ]


def _describe_16_bit(plan: Plan, total: int) -> str:
    """Return which parameters no format quantizes, and their share."""
    names, delta_net = ["tower", "projector", "embedding", "output layer"], plan.decoder.delta_net
    if delta_net is not None:
        names.append(f"Gated DeltaNets ({sum(delta_net.layers)} of {plan.decoder.layers} layers)")
    share = 1 - linear_parameters(plan) / total
    return f"in 16 bit  {100 * share:.0f} % of the parameters: {', '.join(names)}"


def _describe_written(plan: Plan, exports: float) -> str:
    """Return the bytes that the recipe's stages write."""
    recipe, parts = plan.recipe, [f"exports {exports / 1e6:,.1f} MB"]
    total = exports
    statistics = plan.decoder.layers * layer_statistics_bytes(plan, 1) / 2  # as float32
    if recipe.calibration.keep_statistics:
        parts.append(f"statistics {statistics / 1e6:,.1f} MB")
        total += statistics
    if "import" in recipe.stages:
        imported = full_model_bytes(plan, bytes_per_parameter(plan))
        parts.append(f"16 bit Megatron checkpoint {imported / 1e6:,.1f} MB")
        total += imported
    kept = ""
    if not recipe.calibration.keep_statistics:
        kept = f"; calibration.keep_statistics would write {statistics / 1e6:,.1f} MB more"
    return f"written    about {total / 1e6:,.1f} MB: {', '.join(parts)}{kept}"
