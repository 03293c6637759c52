"""Kinds of damage to the tensors of a model folder and to their index."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from campaigns.cases import INDEX, VALUES, Case, Damage, dump, pick
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _tensors(
    rng: random.Random, case: Case, edit: Callable[[dict[str, torch.Tensor], str], str | None]
) -> str | None:
    """Pass the tensors of a file, and the name of one of them, to a function that changes them."""
    path = pick(rng, case.model, "*.safetensors")
    assert path is not None
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = rng.choice(sorted(tensors))
    done = edit(tensors, name)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"format": "pt"})
    return done and f"{path.name} {name} {done}"


def remove_tensor(rng: random.Random, case: Case) -> str | None:
    """Remove a tensor."""
    return _tensors(rng, case, lambda tensors, name: tensors.pop(name) is not None and "removed")


def rename_tensor(rng: random.Random, case: Case) -> str | None:
    """Give a tensor a name of another version, another module or another case."""

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        others = (name.upper(), f"model.{name}", name.removesuffix("weight") + "bias", "", "x\ny")
        other = rng.choice(others)
        tensors[other] = tensors.pop(name)
        return f"is {other!r}"

    return _tensors(rng, case, edit)


def retype_tensor(rng: random.Random, case: Case) -> str | None:
    """Store a tensor in another dtype."""
    types = ("float32", "float16", "bfloat16", "float64", "int8", "int64", "uint8", "bool")
    dtype = getattr(torch, rng.choice((*types, "float8_e4m3fn", "complex64")))

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        if tensors[name].dtype == dtype:
            return None
        tensors[name] = tensors[name].to(dtype)
        return f"as {dtype}"

    return _tensors(rng, case, edit)


def reshape_tensor(rng: random.Random, case: Case) -> str | None:
    """Give a tensor another shape."""

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        tensor = tensors[name]
        changes = (
            lambda t: t.flatten(),
            lambda t: t[:-1],
            lambda t: t[:0],
            lambda t: t[None],
            lambda t: t.sum(),
            lambda t: t.t() if t.dim() == 2 else t[..., None],
        )
        tensors[name] = rng.choice(changes)(tensor).clone()
        if tensors[name].shape == tensor.shape:
            return None
        return f"from {list(tensor.shape)} to {list(tensors[name].shape)}"

    return _tensors(rng, case, edit)


def add_tensor(rng: random.Random, case: Case) -> str | None:
    """Add a tensor."""

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        near = name.rpartition(".")[0]
        last = rng.choice(("bias", "weight_scale", "lora_A.weight", "rotary_emb.inv_freq", "g_idx"))
        tensors[f"{near}.{last}"] = torch.ones(rng.choice((1, 4)), dtype=torch.bfloat16)
        return f"beside: {near}.{last}"

    return _tensors(rng, case, edit)


def spoil_tensor(rng: random.Random, case: Case) -> str | None:
    """Put NaN or Inf into a tensor."""

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        if not tensors[name].is_floating_point():
            return None
        value = rng.choice(("nan", "inf", "-inf"))
        flat = tensors[name].view(-1)
        flat[rng.randrange(len(flat))] = float(value)
        return f"holds {value}"

    return _tensors(rng, case, edit)


def scale_tensor(rng: random.Random, case: Case) -> str | None:
    """Make a tensor zero, tiny or huge."""
    factor = rng.choice((0.0, 1e-30, 1e10, 1e35, -1.0))

    def edit(tensors: dict[str, torch.Tensor], name: str) -> str:
        tensors[name] = (tensors[name].double() * factor).to(tensors[name].dtype)
        return f"times {factor}"

    return _tensors(rng, case, edit)


def _shard(case: Case) -> tuple[Path, dict[str, str]] | None:
    """Split the weights in two and return the folder and the weight map."""
    part = case.model / "llm" if (case.model / "llm").exists() else case.model
    if not (part / WEIGHTS).exists():
        return None
    tensors = load_file(part / WEIGHTS)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for half, shard in zip(halves, SHARDS, strict=True):
        save_file({name: tensors[name] for name in half}, part / shard, {"format": "pt"})
    (part / WEIGHTS).unlink()
    return part, {name: SHARDS[name in halves[1]] for name in names}


def change_index(rng: random.Random, case: Case) -> str | None:
    """Write weights in two files and an index that is right or not."""
    sharded = _shard(case)
    if sharded is None:
        return None
    part, weight_map = sharded
    name = rng.choice(sorted(weight_map))
    total = {"total_size": rng.choice((1, -1, None, "x", [], 2**70))}
    content: dict[str, Any] = {"weight_map": weight_map, "metadata": total}
    outside = rng.choice(("../x.safetensors", "/etc/passwd", "", "a\0b", "."))
    changes: dict[str, Callable[[], Any]] = {
        "right": lambda: None,
        "other": lambda: weight_map.update({name: SHARDS[weight_map[name] == SHARDS[0]]}),
        "missing": lambda: weight_map.pop(name),
        "more": lambda: weight_map.update({"more.weight": SHARDS[0]}),
        "lost": lambda: weight_map.update({name: "model-00003-of-00003.safetensors"}),
        "outside": lambda: weight_map.update({name: outside}),
        "value": lambda: weight_map.update({name: rng.choice(VALUES)}),
        "stale": lambda: shutil.copy(part / SHARDS[0], part / "model-00003-of-00003.safetensors"),
        "cut": lambda: os.truncate(part / SHARDS[1], 1000),
    }
    kind = rng.choice(sorted(changes))
    changes[kind]()
    (part / INDEX).write_text(dump(content))
    return f"{INDEX}: {kind} {name} {weight_map.get(name)} {SHARDS[1] if kind == 'cut' else ''}"


def double_weights(rng: random.Random, case: Case) -> str | None:
    """Leave both model.safetensors and shards, or a tensor in both shards."""
    part = case.model / "llm" if (case.model / "llm").exists() else case.model
    whole = (part / WEIGHTS).read_bytes()
    sharded = _shard(case)
    assert sharded is not None
    kind = rng.choice(("whole too", "tensor twice", "no index"))
    if kind == "whole too":
        (part / WEIGHTS).write_bytes(whole)
    elif kind == "tensor twice":
        second = load_file(part / SHARDS[1])
        name = rng.choice(sorted(load_file(part / SHARDS[0])))
        second[name] = torch.zeros(3)
        save_file(second, part / SHARDS[1])
    if kind != "no index":
        (part / INDEX).write_text(json.dumps({"weight_map": sharded[1]}))
    return f"{WEIGHTS} {SHARDS[1]}: {kind}"


TENSOR_DAMAGES: tuple[Damage, ...] = (
    remove_tensor, rename_tensor, retype_tensor, reshape_tensor, add_tensor, spoil_tensor,
    scale_tensor, change_index, double_weights,
)  # fmt: skip
