"""Reading Hugging Face checkpoints: the 16 bit source, and unified checkpoints of modelopt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from nemo_vlm_ptq.errors import ProofError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.runtime.checkpoint import ReadCheckpoint, dequantize
from nemo_vlm_ptq.source import Tensor, open_tensors

SUFFIXES = {
    "weight": "weight",
    "weight_scale": "scale",
    "weight_scale_2": "scale_2",
    "input_scale": "input_scale",
    "pre_quant_scale": "prequant",
}


def read_source(places: Mapping[str, Tensor]) -> ReadCheckpoint:
    """All tensors of a 16 bit checkpoint under their published names."""
    with open_tensors(places) as reader:
        return ReadCheckpoint({}, {name: reader.whole(name) for name in places})


def read_unified(folder: Path, family: ModelFamily) -> ReadCheckpoint:
    """A unified checkpoint: quantized linears by their scales, everything else as it lies.

    Names are PART/NAME where the family keeps its parts in sub-folders.

    Raises:
        ProofError: files are missing or damaged, or a scale has no weight.
    """
    try:
        home = folder / family.decoder_part
        block = json.loads((home / "hf_quant_config.json").read_text())["quantization"]
        tensors = {}
        for part in family.parts:
            start = f"{part}/" if part else ""
            for path in sorted((folder / part).glob("*.safetensors")):
                tensors.update({start + name: t for name, t in load_file(path).items()})
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
