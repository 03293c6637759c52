"""The support matrix: families and formats as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES, QuantFormat
from nemo_vlm_ptq.planning.plan import supported_targets

# quant_algo -> who reads a Hugging Face checkpoint of it: TensorRT-LLM 1.2 without an engine
# (tensorrt_llm/_torch/modules/linear.py), vLLM (quantization/modelopt.py), transformers.
READERS: dict[str, tuple[str, ...]] = {
    "FP8": ("TensorRT-LLM", "vLLM"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("TensorRT-LLM", "vLLM"),
    "W8A16": ("TensorRT-LLM",),
    "W4A16_AWQ": ("TensorRT-LLM",),
    "W4A8_AWQ": ("TensorRT-LLM",),
    "NVFP4": ("TensorRT-LLM", "vLLM"),
    "NVFP4_AWQ": ("TensorRT-LLM",),
    "NF4": ("transformers", "vLLM"),
}
NOBODY = ("nobody known",)


def show_matrix(what: str, *, as_json: bool) -> str:
    """The families or the formats."""
    rows = _families() if what == "families" else _formats()
    if as_json:
        return json.dumps(rows, indent=1)
    header = list(rows[0])
    table = [header, *([row[key] for key in header] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
             for line in table]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _families() -> list[dict[str, str]]:
    return [
        {
            "family": family.name,
            "architecture": ", ".join(family.architectures),
            "formats": ", ".join(FORMATS),
            "decoder in TensorRT-LLM": family.trtllm_architecture,
        }
        for family in FAMILIES.values()
    ]


def _formats() -> list[dict[str, str]]:
    return [
        {
            "format": row.name,
            "bits": f"{row.bits:g}",
            "targets": ", ".join(row.targets),
            "algorithm": row.algorithm,
            "read by": _by_target(row, _readers(row)),
            "KV caches": _by_target(row, _kv_caches(row)),
            "about": row.about,
        }
        for row in FORMATS.values()
    ]


def _readers(row: QuantFormat) -> dict[str, Sequence[str]]:
    """Target -> who reads a format there."""
    hf = READERS.get(row.quant_algo, NOBODY)
    compressed = ("vLLM", "transformers")
    return {"trtllm": ("engines",), "hf": hf, "compressed_tensors": compressed, "nemo": ("NeMo",)}


def _kv_caches(row: QuantFormat) -> dict[str, list[str]]:
    """Target -> KV caches that go with a format there."""
    return {
        target: [kv for kv in KV_CACHES if target in supported_targets(row, kv)]
        for target in row.targets
    }


def _by_target(row: QuantFormat, found: Mapping[str, Sequence[str]]) -> str:
    """What was found for each target of a format."""
    parts = [f"{target}: {', '.join(found[target])}" for target in row.targets if found[target]]
    return "; ".join(parts)
