"""Kinds of damage to a model folder: its files, JSON values, tensors and indices.

Each is a function (random numbers, case) -> what was done, or None where the folder has nothing of
that kind. What was done names the file, key or tensor that a message should name.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1842767\n"
RAW = "raw:"  # marks text that is written into JSON as it is
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e300, 2**31, 2**64, 10**30, "x", "", "8", "1e9",
    "\ud800", "a\nb", "default", [], {}, ["x"], [1, 2, 3], [[]], {"a": 1}, [None], [2**40, 2**40],
    *(RAW + word for word in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 50)),
)  # fmt: skip
FOREIGN = {
    "adapter_config.json": b"{}",
    "pytorch_model.bin": b"x",
    "hf_quant_config.json": b"{}",
    "consolidated.safetensors": b"x",
    "model-00009-of-00009.safetensors": b"x",
    INDEX: b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "chat_template.json": b'{"chat_template": "{% for"}',
    "processor_config.json": b'{"image_processor": {"size": "x"}}',
    "added_tokens.json": b'{"<more>": 100000}',
    "vocab.json": b"[]",
    "merges.txt": b"\xff",
    "tokenizer.model": b"\x0a\x00",
    "modeling_own.py": b"import sys; sys.exit(9)",
    ".hidden": b"x",
}
TEMPLATES = (
    "", "x", "{{", "{% for %}", "{{ messages[9].content }}", "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "{{ 1 / 0 }}",
    "{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "{{ ''.__class__.__mro__ }}",
    "<image>QUESTION", "{{ messages[0].content }}\n\n", "\x00", "{{ bos_token * 3 }}",
    "{% include 'x' %}", "{% set x = namespace(a=1) %}{{ x.b.c }}", "USER: {{ messages[0]['content'] }}",
)  # fmt: skip


@dataclass
class Case:
    """Copies to be damaged: `model/`, `data/`, and a recipe with its overrides in `folder`."""

    folder: Path
    tree: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    command: str = "plan"

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.folder / "model"

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "data"

    @property
    def recipe(self) -> Path:
        """The recipe, written after most damages, from `tree`."""
        return self.folder / "recipe.yaml"


Damage = Callable[[random.Random, Case], str | None]


def pick(rng: random.Random, folder: Path, *patterns: str) -> Path | None:
    """Return one of the regular files of a folder."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return rng.choice(sorted(found) or [None])


def dump(content: Any) -> str:
    """Return JSON in which strings that start with RAW are raw text."""
    return re.sub(rf'"{RAW}([^"]*)"', r"\1", json.dumps(content))


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value at any depth."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    own = [(value, key) for key in keys]
    return own + [found for key in keys for found in nodes(value[key])]


# Bytes


def flip_text(rng: random.Random, case: Case) -> str | None:
    """Flip bits of a JSON, tokenizer or template file."""
    path = pick(rng, case.model, "*.json", "*.jinja")
    assert path is not None
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name}: bits flipped"


def flip_header(rng: random.Random, case: Case) -> str | None:
    """Flip bits in the length or the header of a safetensors file."""
    path = pick(rng, case.model, "*.safetensors")
    assert path is not None
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.choice((rng.randrange(8), rng.randrange(8 + length)))
            file.seek(place)
            byte = file.read(1)[0] ^ (1 << rng.randrange(8))
            file.seek(place)
            file.write(bytes([byte]))
    return f"{path.name}: bits of the header flipped"


def flip_weights(rng: random.Random, case: Case) -> str | None:
    """Flip bits behind the header of a safetensors file."""
    path = pick(rng, case.model, "*.safetensors")
    assert path is not None
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        place = rng.randrange(start, path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0] ^ (1 << rng.randrange(8))
        file.seek(place)
        file.write(bytes([byte]))
    return f"{path.name}: a bit at {place} flipped tensor"


def truncate(rng: random.Random, case: Case) -> str | None:
    """Cut a file, also to nothing."""
    path = pick(rng, case.model, "*.*")
    assert path is not None
    size = path.stat().st_size
    keep = rng.choice((0, 1, 7, size // 2, size - 1, max(0, size - 20)))
    os.truncate(path, min(keep, size))
    return f"{path.name}: cut from {size} to {keep}"


def append(rng: random.Random, case: Case) -> str | None:
    """Lengthen a file."""
    path = pick(rng, case.model, "*.*")
    assert path is not None
    path.write_bytes(path.read_bytes() + rng.choice((b"x", b"\0" * 8, b"{}", b"\n")))
    return f"{path.name}: lengthened"


def recode(rng: random.Random, case: Case) -> str | None:
    """Write a JSON file in another encoding, nested without end, or with a key twice."""
    path = pick(rng, case.model, "*.json", "*.jinja")
    assert path is not None
    content, kind = path.read_bytes(), rng.choice(("bom", "utf16", "latin", "deep", "twice", "list"))
    changed = {
        "bom": b"\xef\xbb\xbf" + content,
        "utf16": content.decode().encode("utf-16"),
        "latin": content.replace(b"e", b"\xe9", 1),
        "deep": b"[" * 200_000,
        "twice": content.replace(b"{", b'{"a": 1, "a": 2,', 1),
        "list": b"[" + content + b"]",
    }[kind]
    path.write_bytes(changed)
    return f"{path.name}: {kind}"


def exchange(rng: random.Random, case: Case) -> str | None:
    """Exchange two files."""
    first, second = (pick(rng, case.model, "*.*") for _ in range(2))
    assert first is not None and second is not None
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return None if first == second else f"{first.name} and {second.name} exchanged"


def remove(rng: random.Random, case: Case) -> str | None:
    """Remove a file."""
    path = pick(rng, case.model, "*.*")
    assert path is not None
    path.unlink()
    return f"{path.name} removed"


def add(rng: random.Random, case: Case) -> str | None:
    """Add a file that other programs write."""
    name = rng.choice(sorted(FOREIGN))
    if (case.model / name).exists():
        return None
    (case.model / name).write_bytes(FOREIGN[name])
    return f"{name} added"


def replace(rng: random.Random, case: Case) -> str | None:
    """Put a link, a FIFO, a folder or a pointer of git-lfs in place of a file."""
    path = pick(rng, case.model, "*.*")
    assert path is not None
    kind = rng.choice(("copy", "inside", "loop", "nothing", "device", "folder", "pipe", "lfs"))
    aside = (case.model if kind == "inside" else case.folder) / "aside"
    shutil.move(path, aside)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "lfs":
        path.write_bytes(LFS)
    else:
        targets = {"loop": path, "nothing": case.model / "no", "device": Path("/dev/zero")}
        path.symlink_to(targets.get(kind, aside))
    return f"{path.name} is a {kind}"


# JSON values


def _edit(rng: random.Random, path: Path | None, actions: tuple[str, ...]) -> str | None:
    """Change, remove or add a value at a random place of a JSON file."""
    if path is None:
        return None
    content = json.loads(path.read_text())
    place, key = rng.choice(nodes(content))
    action = rng.choice(actions)
    if action == "remove":
        del place[key]
    elif action == "change":
        place[key] = rng.choice(VALUES)
    else:
        numbers = [(p, k) for p, k in nodes(content) if type(p[k]) in (int, float)]
        if not numbers:
            return None
        place, key = rng.choice(numbers)
        number = place[key]
        place[key] = rng.choice(
            (number + 1, -number, number * 2, float(number), str(number), number * 10**12, [number])
        )
    shown = "" if action == "remove" else repr(place[key])[:40]
    path.write_text(dump(content))
    return f"{path.name}: {action} {key} {shown}"


def change_config(rng: random.Random, case: Case) -> str | None:
    """Change a value of a config.json at any depth."""
    return _edit(rng, pick(rng, case.model, "config.json"), ("change", "change", "number"))


def remove_config_key(rng: random.Random, case: Case) -> str | None:
    """Remove a key of a config.json."""
    return _edit(rng, pick(rng, case.model, "config.json"), ("remove",))


def add_config_key(rng: random.Random, case: Case) -> str | None:
    """Add a key that configs of other models have."""
    path = pick(rng, case.model, "config.json")
    assert path is not None
    content = json.loads(path.read_text())
    inner = [content, *(value for value in content.values() if isinstance(value, dict))]
    keys = (
        "rope_scaling", "rope_parameters", "sliding_window", "attention_bias", "mlp_bias", "dtype",
        "layer_types", "quantization_config", "use_sliding_window", "auto_map", "num_experts",
        "vision_feature_layer", "partial_rotary_factor", "hidden_act", "transformers_version",
        "head_dim", "attn_implementation", "_attn_implementation", "torch_dtype", "id2label",
        "attention_dropout", "pretraining_tp", "use_cache", "output_attentions", "num_labels",
        "logit_scale", "original_max_position_embeddings", "rope_theta", "vision_config", "x",
    )  # fmt: skip
    key, value = rng.choice(keys), rng.choice(VALUES)
    rng.choice(inner)[key] = value
    path.write_text(dump(content))
    return f"{path.name}: {key} set to {value!r}"


def change_processor(rng: random.Random, case: Case) -> str | None:
    """Change the settings of the image processor."""
    path = pick(rng, case.model, "preprocessor_config.json", "processor_config.json")
    return _edit(rng, path, ("change", "number", "remove"))


def change_tokenizer(rng: random.Random, case: Case) -> str | None:
    """Change the tokenizer's settings or added tokens."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    path = pick(rng, case.model, *names)
    return _edit(rng, path, ("change", "change", "number", "remove"))


def change_vocabulary(rng: random.Random, case: Case) -> str | None:
    """Change tokenizer.json, its vocabulary apart."""
    path = pick(rng, case.model, "tokenizer.json")
    assert path is not None
    content = json.loads(path.read_text())
    parts = {key: value for key, value in content.items() if key != "model"}
    parts["model"] = {k: v for k, v in content["model"].items() if k not in ("vocab", "merges")}
    place, key = rng.choice(nodes(parts))
    place[key] = value = rng.choice(VALUES)
    model = parts["model"]
    if isinstance(model, dict):
        parts["model"] = {k: content["model"][k] for k in ("vocab", "merges")} | model
    path.write_text(dump(parts))
    return f"{path.name}: {key} set to {value!r}, tokenizer"


def change_template(rng: random.Random, case: Case) -> str | None:
    """Give the folder another chat template."""
    template = rng.choice(TEMPLATES)
    if rng.random() < 0.5:
        (case.model / "chat_template.jinja").write_text(template)
    else:
        (case.model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return f"chat_template {template!r}"


# Tensors


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


# Indices


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
    name, content = rng.choice(sorted(weight_map)), dict[str, Any](weight_map=weight_map)
    content["metadata"] = {"total_size": rng.choice((1, -1, None, "x", [], 2**70))}
    kinds = ("right", "other", "missing", "more", "lost", "outside", "value", "none", "stale", "cut")
    kind = rng.choice(kinds)
    if kind == "other":
        weight_map[name] = SHARDS[weight_map[name] == SHARDS[0]]
    elif kind == "missing":
        del weight_map[name]
    elif kind == "more":
        weight_map["more.weight"] = SHARDS[0]
    elif kind == "lost":
        weight_map[name] = "model-00003-of-00003.safetensors"
    elif kind == "outside":
        weight_map[name] = rng.choice(("../x.safetensors", "/etc/passwd", "", "a\0b", "."))
    elif kind == "value":
        weight_map[name] = rng.choice([value for value in VALUES if value != "\ud800"])
    elif kind == "stale":
        shutil.copy(part / SHARDS[0], part / "model-00003-of-00003.safetensors")
    elif kind == "cut":
        os.truncate(part / SHARDS[1], 1000)
    if kind != "none":
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


FOLDER_DAMAGES: tuple[Damage, ...] = (
    flip_text, flip_header, flip_weights, truncate, append, recode, exchange, remove, add, replace,
    change_config, remove_config_key, add_config_key, change_processor, change_tokenizer,
    change_vocabulary, change_template, remove_tensor, rename_tensor, retype_tensor,
    reshape_tensor, add_tensor, spoil_tensor, scale_tensor, change_index, double_weights,
)  # fmt: skip
# Accepted, the exports must be those of the undamaged folder.
STRICT = frozenset(
    ("truncate", "append", "replace", "remove_tensor", "rename_tensor", "reshape_tensor",
     "add_tensor", "spoil_tensor", "change_index", "double_weights", "flip_header")
)  # fmt: skip
