"""Reading Hugging Face checkpoints: the 16 bit source, and unified checkpoints of modelopt."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from nemo_vlm_ptq.errors import ProofError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.runtime.checkpoint import ReadCheckpoint, dequantize
from nemo_vlm_ptq.source import list_tensors, open_tensors

SUFFIXES = {
    "weight": "weight",
    "weight_scale": "scale",
    "weight_scale_2": "scale_2",
    "input_scale": "input_scale",
    "pre_quant_scale": "prequant",
}


def read_source(folder: Path, family: ModelFamily) -> ReadCheckpoint:
    """All tensors of a 16 bit checkpoint under their published names."""
    places = list_tensors(folder, family.aliases)
    with open_tensors(places) as reader:
        return ReadCheckpoint({}, {name: reader.whole(name) for name in places})


def read_unified(folder: Path) -> ReadCheckpoint:
    """A unified checkpoint: quantized linears by their scales, everything else as it lies.

    Raises:
        ProofError: files are missing or damaged, or a scale has no weight.
    """
    try:
        block = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(path))
    except Exception as error:  # safetensors raises its own types for damage of any kind
        raise ProofError(f"{folder} cannot be read: {error}") from None
    names = sorted(n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale"))
    linears = {}
    for name in names:
        parts = {
            key: tensors.pop(f"{name}.{suffix}")
            for suffix, key in SUFFIXES.items()
            if f"{name}.{suffix}" in tensors
        }
        linears[name] = dequantize(parts, block["quant_algo"], name)
    return ReadCheckpoint(linears, tensors)
