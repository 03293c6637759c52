"""The contract of a TensorRT-LLM checkpoint, checked with nothing but its folder.

TensorRT-LLM itself only warns of a wrong dtype or an extra tensor; here everything must be exact:
config.json, rank files, names, shapes and dtypes, and what can be told of the values without the
model that they came from. Right-shaped tensors with wrong values inside (the shards of two ranks
exchanged, gate for up, another model's weights) look like any others; the stage verify, which has
the source, finds those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object, read_safetensors_header
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.targets.trtllm.contract_config import check_config, quantization_of
from nemo_vlm_ptq.targets.trtllm.contract_tensors import ExpectedTensor, expected_tensors
from nemo_vlm_ptq.targets.trtllm.contract_values import VALUE_CHECKS, check_stage


@dataclass(frozen=True)
class Check:
    """One check: its name, what it found, and what it looked at."""

    name: str
    findings: list[str]
    about: str


def check_contract(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint folder, one line each; empty when all is right."""
    return [finding for check in contract_checks(folder) for finding in check.findings]


def contract_checks(folder: Path) -> list[Check]:
    """All checks of a checkpoint folder, of any writer; after a wrong config.json just that one.

    Args:
        folder: holds config.json and rank{r}.safetensors.
    """
    try:
        config = read_json_object(folder / "config.json")
    except (OSError, UserError) as error:
        return [Check("config", [f"config.json cannot be read: {error}"], "")]
    if problems := check_config(config):
        return [Check("config", problems, "")]
    world, tp = config["mapping"]["world_size"], config["mapping"]["tp_size"]
    headers, files = _read_headers(folder, world)
    found: dict[str, list[str]] = {name: [] for name in ("names", "shapes", *VALUE_CHECKS)}
    for first in range(0, world, tp):
        own = {rank: headers[rank] for rank in range(first, first + tp) if rank in headers}
        slots = _needed(expected_tensors(config, first), own)
        for rank, entries in own.items():
            found["names"] += _check_names(entries, slots, rank)
            found["shapes"] += _check_shapes(entries, slots, rank)
        right = {
            name: slot
            for name, slot in slots.items()
            if all(_fits(entries.get(name), slot) for entries in own.values())
        }
        if len(own) == tp:  # values are compared over the tensor ranks
            paths = [folder / f"rank{rank}.safetensors" for rank in own]
            for name, problems in check_stage(paths, right, config).items():
                found[name] += problems
    about = {
        "names": f"{sum(map(len, headers.values()))} tensors, each where it belongs",
        "shapes": "and dtypes, as each rank loads them",
        "values": "finite, every scale above 0",
        "ranks": "the same where nothing is cut, KV heads repeated rightly",
        "padding": f"zeros after a vocabulary of {config['vocab_size']}",
    }
    checks = [
        Check("config", [], _describe(config)),
        Check("files", files, f"one for each of {world} ranks"),
    ]
    return checks + [Check(name, problems, about[name]) for name, problems in found.items()]


def _describe(config: Mapping[str, Any]) -> str:
    """What a config.json says that it is, and what it leaves to the loader."""
    block, mapping = quantization_of(config), config["mapping"]
    algorithm, kv = (block.get(key) or "16 bit" for key in ("quant_algo", "kv_cache_quant_algo"))
    parts = [
        f"{config['architecture']}, {algorithm}, KV cache {kv}",
        f"TP {mapping['tp_size']} x PP {mapping['pp_size']}",
    ]
    if "rotary_base" not in config:
        parts.append("rotary_base is not given: 10000")
    return ", ".join(parts)


def _read_headers(folder: Path, world: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """(rank -> tensor -> its entry in the header, what is wrong with the files)."""
    names = [f"rank{rank}.safetensors" for rank in range(world)]
    headers, problems = {}, []
    for rank, name in enumerate(names):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            headers[rank] = read_safetensors_header(folder / name)
            with safe_open(folder / name, framework="pt"):  # it looks closer
                pass
        except Exception as error:  # any damage of the file is a finding
            headers.pop(rank, None)
            problems.append(f"{name} cannot be read: {error}")
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    problems += [f"{name} does not belong here" for name in present if name not in names]
    return headers, problems


def _needed(
    slots: Mapping[str, ExpectedTensor], own: Mapping[int, Mapping[str, Any]]
) -> dict[str, ExpectedTensor]:
    """Slots without the optional ones that no tensor rank has."""
    return {
        name: slot
        for name, slot in slots.items()
        if not slot.optional or any(name in entries for entries in own.values())
    }


def _check_names(
    own: Mapping[str, Any], slots: Mapping[str, ExpectedTensor], rank: int
) -> list[str]:
    file = f"rank{rank}.safetensors"
    problems = [f"{file}: {name} is missing" for name in sorted(set(slots) - set(own))]
    return problems + [f"{file}: {name} is extra" for name in sorted(set(own) - set(slots))]


def _check_shapes(
    own: Mapping[str, Any], slots: Mapping[str, ExpectedTensor], rank: int
) -> list[str]:
    problems = []
    for name in sorted(set(slots) & set(own)):
        slot, entry, place = slots[name], own[name], f"rank{rank}.safetensors: {name}"
        if _shape(entry) != slot.shape:
            problems.append(f"{place} has shape {entry['shape']}, not {list(slot.shape)}")
        if entry["dtype"] != slot.dtype:
            problems.append(f"{place} has dtype {entry['dtype']}, not {slot.dtype}")
    return problems


def _fits(entry: Mapping[str, Any] | None, slot: ExpectedTensor) -> bool:
    """The tensor is there, in shape and dtype."""
    return entry is not None and (_shape(entry), entry["dtype"]) == (slot.shape, slot.dtype)


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape as the loader takes it: one number may have no axis."""
    return tuple(entry["shape"]) or (1,)
