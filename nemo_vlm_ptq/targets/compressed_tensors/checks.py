"""Check config.json and the index of a compressed-tensors checkpoint against source and format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.checkpoints.safetensors_header import read_safetensors_header
from nemo_vlm_ptq.targets.checking import (
    Check,
    ExpectedQuantization,
    differences,
    index_differences,
)

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan

PER_TENSOR = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
PER_TOKEN = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}
PER_CHANNEL = {"type": "int", "num_bits": 8, "strategy": "channel"}
PER_GROUP = {"type": "int", "num_bits": 4, "strategy": "group"}
PER_BLOCK = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
# Format -> layout, weights, inputs.
DESCRIPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "fp8": ("float-quantized", PER_TENSOR, PER_TENSOR),
    "fp8_pc_pt": ("float-quantized", PER_TENSOR | {"strategy": "channel"}, PER_TOKEN),
    "int8_sq": ("int-quantized", PER_CHANNEL, PER_TENSOR | {"type": "int"}),
    "int4_awq": ("pack-quantized", PER_GROUP, None),
    "w4a8_awq": ("pack-quantized", PER_GROUP, PER_TOKEN),
    "int8_wo": ("pack-quantized", PER_CHANNEL, None),
    "int4_wo": ("pack-quantized", PER_GROUP, None),
    "nvfp4": ("nvfp4-pack-quantized", PER_BLOCK, PER_BLOCK | {"dynamic": "local"}),
}


def check(folder: Path, plan: Plan, expected: ExpectedQuantization) -> Iterator[Check]:
    """Yield the checks of one checkpoint folder."""
    source = plan.family.decoder_config(plan.export_config)
    home = plan.family.decoder_subfolder
    tied = (plan.head_name.removeprefix(f"{home}/"),) if plan.decoder.tied_head else ()
    findings = check_configs(folder / home, source, expected, tied)
    yield Check(
        name="configs", findings=findings, about="configs describe the source in this format"
    )


def check_configs(
    folder: Path,
    source: Mapping[str, Any],
    expected: ExpectedQuantization,
    tied: Iterable[str] = (),
) -> list[str]:
    """Return findings of config.json and the index.

    Args:
        folder: the decoder's checkpoint.
        source: config.json of the source.
        expected: the quantization.
        tied: weights of linears that the checkpoint does not hold.
    """
    config = json.loads((folder / "config.json").read_text())
    findings = differences("config.json", config, source)
    block = config["quantization_config"]
    layout, weights, inputs = DESCRIPTIONS[expected.fmt.name]
    if weights is PER_GROUP:
        weights = PER_GROUP | {"group_size": expected.group_size}
    values = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
    }
    findings += differences("config.json", block, values)
    (group,) = block["config_groups"].values()
    findings += differences("config.json", group, {"targets": ["Linear"], "format": layout})
    findings += _check_args(group["weights"], weights | {"dynamic": False})
    findings += _check_args(block.get("kv_cache_scheme"), PER_TENSOR if expected.kv else None)
    findings += _check_args(group.get("input_activations"), inputs)
    headers = {path: read_safetensors_header(path) for path in folder.glob("*.safetensors")}
    dims = {name: len(one["shape"]) for file in headers.values() for name, one in file.items()}
    findings += _check_ignored(block["ignore"], dims | dict.fromkeys(tied, 2))
    names = {name: path.name for path, header in headers.items() for name in header}
    return findings + index_differences(folder, names)


def _check_args(actual: Any, expected: dict[str, Any] | None) -> list[str]:
    """Compare one set of QuantizationArgs; None: there must be none."""
    if expected is None or actual is None:
        if actual is expected:
            return []
        return [f"config.json: {actual} where {expected} is expected"]
    return differences("config.json", actual, expected | {"symmetric": True})


def _check_ignored(ignored: Sequence[str], dims: Mapping[str, int]) -> list[str]:
    """Check that no quantized linear is ignored, and that every other matrix is."""
    findings = []
    for name in sorted(dims):
        module, _, last = name.rpartition(".")
        quantized = f"{module}.weight_scale" in dims
        if last not in ("weight", "weight_packed") or (dims[name] < 2 and not quantized):
            continue
        if quantized == any(re.match(one.removeprefix("re:"), module) for one in ignored):
            findings.append(f"config.json: ignore is wrong for {module}")
    return findings
