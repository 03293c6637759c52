"""Check the JSON files of a unified Hugging Face checkpoint against source and format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.checkpoints.safetensors_header import read_safetensors_header
from nemo_vlm_ptq.targets.checking import (
    Check,
    ExpectedQuantization,
    differences,
    index_differences,
    quantization_differences,
)

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan

PROJECTION = re.compile(r"proj[^.]*\.weight$")  # of a linear
BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
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
    """Return findings of config.json, hf_quant_config.json and the index.

    Args:
        folder: the decoder's checkpoint.
        source: config.json of the source.
        expected: the quantization.
        tied: weights of linears that the checkpoint does not hold.
    """
    config = json.loads((folder / "config.json").read_text())
    findings = differences("config.json", config, source)
    names = {
        name: path.name
        for path in folder.glob("*.safetensors")
        for name in read_safetensors_header(path)
    }
    block = config["quantization_config"]
    if expected.fmt.weight == "nf4":
        findings += differences("config.json", block, BITSANDBYTES)
        findings += _check_skipped(block["llm_int8_skip_modules"], names)
    else:
        findings += _check_modelopt(folder, block, {*names, *tied}, expected)
    return findings + index_differences(folder, names)


def _check_modelopt(
    folder: Path, config: Mapping[str, Any], names: Iterable[str], expected: ExpectedQuantization
) -> list[str]:
    """Check both of modelopt's descriptions, and their lists of excluded modules."""
    block = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    findings = quantization_differences("hf_quant_config.json", block, expected)
    findings += quantization_differences("config.json", config, expected)
    scheme: Any = expected.kv and expected.kv.quant_algo
    if scheme == "FP8":
        scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    findings += differences("config.json", config, {"kv_cache_scheme": scheme})
    scaled = {name.removesuffix("_scale") for name in names if name.endswith(".weight_scale")}
    plain = [name for name in names if name.endswith(".weight") and name not in scaled]
    excluded = sorted(name.removesuffix(".weight") for name in plain)
    findings += differences("hf_quant_config.json", block, {"exclude_modules": excluded})
    return findings + differences("config.json", config, {"ignore": excluded})


def _check_skipped(skipped: Iterable[str], names: Iterable[str]) -> list[str]:
    """Check that transformers would take for quantized exactly the linears that are.

    transformers skips a linear whose name starts or ends with one of `skipped`.
    """
    quantized = {name.removesuffix(".absmax") for name in names if name.endswith(".absmax")}
    findings = []
    for name in sorted(filter(PROJECTION.search, names)):
        module = name.removesuffix(".weight")
        skips = any(module.startswith(one) or module.endswith(one) for one in skipped)
        if skips == (name in quantized):
            findings.append(f"config.json: llm_int8_skip_modules is wrong for {module}")
    return findings
