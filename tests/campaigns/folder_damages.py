"""Kinds of damage to a model folder: its files and JSON values.

Each is a function (random numbers, case) -> what was done, or None where the folder has nothing of
that kind. What was done names the file, key or tensor that a message should name.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from campaigns.cases import INDEX, LFS, VALUES, Case, Damage, dump, nodes, pick

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
    "{% include 'x' %}", "{% set x = namespace(a=1) %}{{ x.b.c }}",
    "USER: {{ messages[0]['content'] }}",
)  # fmt: skip


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
    content, kind = (
        path.read_bytes(),
        rng.choice(("bom", "utf16", "latin", "deep", "twice", "list")),
    )
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


FOLDER_DAMAGES: tuple[Damage, ...] = (
    flip_text, flip_header, flip_weights, truncate, append, recode, exchange, remove, add, replace,
    change_config, remove_config_key, add_config_key, change_processor, change_tokenizer,
    change_vocabulary, change_template,
)  # fmt: skip
