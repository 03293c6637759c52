"""The export targets. A new target adds its package below targets/ and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Literal

from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.targets.compressed_tensors.spec import SPEC as COMPRESSED_TENSORS
from nemo_vlm_ptq.targets.hf.spec import SPEC as HF
from nemo_vlm_ptq.targets.megatron.spec import SPEC as MEGATRON
from nemo_vlm_ptq.targets.nemo2.spec import SPEC as NEMO2
from nemo_vlm_ptq.targets.spec import TargetSpec
from nemo_vlm_ptq.targets.trtllm.spec import SPEC as TRTLLM

TARGETS: dict[str, TargetSpec] = {
    spec.name: spec for spec in (COMPRESSED_TENSORS, HF, MEGATRON, TRTLLM, NEMO2)
}


def load_module(target: str, part: Literal["writer", "reader", "checks"]) -> ModuleType:
    """Import one part of a target's package.

    writer: `PUBLISHED`, for targets under Hugging Face names, else `write(context, fmt, folder) ->
        StageOutput`.
    reader: `read(folder, plan) -> ReadCheckpoint`, independent of the writer.
    checks: `check(folder, plan, expected) -> Iterator[Check]`, rules for the target's own files.
    """
    return import_module(f"nemo_vlm_ptq.targets.{TARGETS[target].package}.{part}")


def with_sources(targets: Iterable[str]) -> list[str]:
    """Return targets in order, each after the target that it is made from."""
    ordered: dict[str, None] = {}
    for name in targets:
        source = TARGETS[name].made_from
        ordered |= dict.fromkeys([source, name] if source else [name])
    return list(ordered)


def supported_targets(fmt: QuantFormat, kv_cache: str = "none") -> list[str]:
    """Return the targets that store a format together with a KV cache format."""
    return [name for name, spec in TARGETS.items() if spec.supports(fmt.name, kv_cache)]


def supported_kv_caches(fmt: QuantFormat, target: str) -> list[str]:
    """Return the KV cache formats that a target stores together with a format."""
    return [name for name in KV_CACHES if TARGETS[target].supports(fmt.name, name)]
