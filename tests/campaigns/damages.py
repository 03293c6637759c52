"""Kinds of damage to an export, each a function (random numbers, folder) -> what was done, or None.

None: the export has nothing of that kind.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from campaigns.json_damages import edit_json, pick_file, repeat_key
from safetensors.torch import load_file, save_file

Damage = Callable[[random.Random, Path], str | None]
FOREIGN = (
    "adapter_config.json", "chat_template.jinja", "added_tokens.json", "tokenizer.model",
    "pytorch_model.bin", "modeling_x.py", "model-00002-of-00002.safetensors", "quant.json",
    "rank9.safetensors", "sub/extra.txt", ".hidden", "vision/extra.json", "llm/extra.json",
)  # fmt: skip
OTHER_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)


def edit_tensors(
    rng: random.Random, folder: Path, edit: Callable[[dict[str, torch.Tensor]], str | None]
) -> str | None:
    """Pass the tensors of one file through a function that changes them."""
    path = pick_file(rng, folder, "*.safetensors")
    if path is None:
        return None
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    done = edit(tensors)
    if _same(tensors, load_file(path)):
        return None  # 1.01 times a scale in fp8, say
    if done is not None:
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"format": "pt"})
    return done and f"{path.relative_to(folder)}: {done}"


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape)
        and torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8)
        )
        for name, tensor in first.items()
    )


def flip_bit(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(tensors))
        flat = tensors[name].view(-1).view(torch.uint8)
        place, bit = rng.randrange(len(flat)), rng.randrange(8)
        flat[place] ^= 1 << bit
        return f"bit {bit} of byte {place} of {name}"

    return edit_tensors(rng, folder, edit)


def change_one_value(rng: random.Random, folder: Path) -> str | None:
    """A code, scale or weight: one more, negated, zero, NaN or Inf."""

    def edit(tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(tensors))
        flat = tensors[name].view(-1)
        place = rng.randrange(len(flat))
        if not flat.is_floating_point():
            flat[place] += 1
            return f"one more at {place} of {name}"
        value, change = float(flat[place]), rng.choice(("sign", "twice", "zero", "nan", "inf"))
        values = {"sign": -value, "twice": 2 * value, "zero": 0.0}
        changed = values.get(change, float(change) if change in ("nan", "inf") else 0.0)
        flat[place] = torch.tensor(changed).to(flat.dtype)
        return f"{change} at {place} of {name}"

    return edit_tensors(rng, folder, edit)


def scale_a_scale(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str | None:
        keys = ("scale", "scaling", "absmax", "lora")
        names = [name for name in sorted(tensors) if any(key in name for key in keys)]
        names = [name for name in names if tensors[name].is_floating_point()]
        if not names:
            return None
        name, factor = rng.choice(names), rng.choice((2.0, 0.5, 1.01, -1.0))
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        return f"{name} times {factor}"

    return edit_tensors(rng, folder, edit)


def swap_tensors(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str | None:
        first = rng.choice(sorted(tensors))
        like = (tensors[first].shape, tensors[first].dtype)
        others = [k for k, t in sorted(tensors.items()) if (t.shape, t.dtype) == like]
        second = rng.choice(others)
        tensors[first], tensors[second] = tensors[second], tensors[first]
        return None if first == second else f"{first} and {second} exchanged"

    return edit_tensors(rng, folder, edit)


def remove_tensor(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(tensors))
        del tensors[name]
        return f"{name} removed"

    return edit_tensors(rng, folder, edit)


def add_tensor(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str:
        near = rng.choice(sorted(tensors)).rpartition(".")[0]
        name = f"{near}.{rng.choice(('bias', 'weight_zero_point', 'more', 'g_idx'))}"
        tensors[name] = torch.zeros(4)
        return f"{name} added"

    return edit_tensors(rng, folder, edit)


def rename_tensor(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(tensors))
        other = name.upper() if rng.random() < 0.5 else f"model.{name}"
        tensors[other] = tensors.pop(name)
        return f"{name} renamed {other}"

    return edit_tensors(rng, folder, edit)


def retype_tensor(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str | None:
        name, dtype = rng.choice(sorted(tensors)), rng.choice(OTHER_DTYPES)
        if tensors[name].dtype == dtype:
            return None
        tensors[name] = tensors[name].float().to(dtype)
        return f"{name} as {dtype}"

    return edit_tensors(rng, folder, edit)


def reshape_tensor(rng: random.Random, folder: Path) -> str | None:
    def edit(tensors: dict[str, torch.Tensor]) -> str | None:
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        if tensor.dim() > 1:
            change = rng.choice((lambda t: t.t(), lambda t: t.flatten(), lambda t: t[:-1]))
            tensors[name] = change(tensor)
        else:
            tensors[name] = tensor.reshape(1, -1)
        return f"{name} reshaped from {list(tensor.shape)} to {list(tensors[name].shape)}"

    return edit_tensors(rng, folder, edit)


def change_metadata(rng: random.Random, folder: Path) -> str | None:
    path = pick_file(rng, folder, "*.safetensors")
    if path is None:
        return None
    metadata = rng.choice(({"format": "tf"}, None, {"format": "pt", "more": "x"}))
    save_file(load_file(path), path, metadata)
    return f"{path.relative_to(folder)}: metadata {metadata}"


def exchange_files(rng: random.Random, folder: Path) -> str | None:
    first, second = (pick_file(rng, folder, "*.*") for _ in range(2))
    if first is None or second is None or first == second:
        return None
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return f"{first.relative_to(folder)} and {second.relative_to(folder)} exchanged"


def truncate_file(rng: random.Random, folder: Path) -> str | None:
    path = pick_file(rng, folder, "*.*")
    assert path is not None
    content = path.read_bytes()
    size = len(content)
    keep = rng.choice((0, 1, size // 2, size - 1, max(0, size - 20)))
    path.write_bytes(content[:keep])
    if content[keep:].isspace():
        return None  # the end of the last line: without effect
    return f"{path.relative_to(folder)} truncated from {size} to {keep}"


def append_to_file(rng: random.Random, folder: Path) -> str | None:
    path = pick_file(rng, folder, "*.*")
    assert path is not None
    path.write_bytes(path.read_bytes() + rng.choice((b"x", b"\0" * 8, b"{}")))
    return f"{path.relative_to(folder)} lengthened"


def remove_file(rng: random.Random, folder: Path) -> str | None:
    path = pick_file(rng, folder, "*.*")
    assert path is not None
    path.unlink()
    return f"{path.relative_to(folder)} removed"


def add_file(rng: random.Random, folder: Path) -> str | None:
    path = folder / rng.choice(FOREIGN)
    if path.exists():
        return None
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"more": torch.zeros(3)}, path)
    else:
        path.write_text("{}")
    return f"{path.relative_to(folder)} added"


def link_file(rng: random.Random, folder: Path) -> str | None:
    """A link to a copy outside, to itself, or to nothing; or a folder in its place."""
    path = pick_file(rng, folder, "*.*")
    assert path is not None
    kind = rng.choice(("copy", "loop", "nothing", "folder", "pipe"))
    aside = folder.parent / f"{folder.name}.aside"
    shutil.move(path, aside)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"copy": aside, "loop": path, "nothing": folder / "no"}[kind])
    return f"{path.name} is a {kind}"


def undamaged_bytes(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file, None for a link and the like."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else None
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }


DAMAGES: tuple[Damage, ...] = (
    flip_bit, change_one_value, scale_a_scale, swap_tensors, remove_tensor, add_tensor,
    rename_tensor, retype_tensor, reshape_tensor, change_metadata, exchange_files, truncate_file,
    append_to_file, remove_file, add_file, link_file, edit_json, edit_json, edit_json, repeat_key,
)  # fmt: skip
