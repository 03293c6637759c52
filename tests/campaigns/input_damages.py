"""Kinds of damage to a data folder, a recipe and a command line."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from typing import Any

from campaigns.cases import LFS, VALUES, Case, Damage, dump, nodes, pick
from PIL import Image

from nemo_vlm_ptq.recipe.loading import recipe_keys

IMAGE_IDS: tuple[Any, ...] = (
    "../i0", "/etc/passwd", "../../model/config", "", " ", ".", "..", "i0.png", "I0",
    "a\0b", "i0\n",
    "\ud800", "é", "x" * 300, "x" * 5000, "*", "[i]0", "~", "$HOME", 0, 1, -1, 1.5, True, None,
    [], ["i0"], {}, {"a": 1}, "i0/../i1", "./i1", "i0\u202e",
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "\ud800", "a\0b", "a\nb", "\u2028", "<image>", "</s>", "<|image_1|>", "<|endoftext|>",
    "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<0x00>", "word " * 5000,
    "\U0001f600" * 50, "{image}", "{question}", "{{ x }}", "%s", "\u202eabc", "<s>", "é", None, 3,
    [], {}, True,
)  # fmt: skip
# Texts of values in recipes and overrides.
WORDS = (
    "null", "true", "no", "0", "1", "-1", "007", "1_000", "0x10", "1e3", "1e999", ".nan", ".inf",
    "12:30:45", "2020-01-01", "'8'", "\"8\"", "\"a\\nb\"", "\"a\\0b\"", "[]", "{}", "[1]", "[x, x]",
    "{a: 1}", "auto", "fp8", "FP8", "all", "~", "''", "!!python/name:os.system", "&a [*a]",
    "x" * 5000,
    "99999999999999999999", "2147483648", "\"\\ud800\"", "%", "@", "`", "- 1", "a: b", "0.5", "/",
)  # fmt: skip
COMMANDS = ("plan", "observe", "solve", "export", "verify", "report", "status", "build", "x", "")
OPTIONS = (
    "--json", "--debug=1", "--dry-run", "--again", "--nonsense", "-x", "--", "=", "==1", "a=", "=a",
    ".=1", "a.b.c.d=1", "calibration=1", "calibration.samples", "calibration..samples=1",
    "calibration.samples.x=1", "calibration.samples= 2", "calibration.samples=2 # two", "\0", "\n",
    "\udcff=1", "model=\udcff", "config=1", "config.text_config.rms_norm_eps=x", "config.x.y=1",
    "config.text_config=", "config.text_config.num_hidden_layers=3", "from=hf", "inputs=x",
    "config.vision_config=[]", "config.architectures=[]", "config.architectures=x", "family=phi",
    "family=", "parallel.tensor=1000", "parallel.data=0", "export.dtype=float64", "workdir=",
    "workdir=/dev/null", "workdir=/proc/x", "model=/", "model=.", "model=a/b/c", "model=~/x",
    "quantize.format=[]", "quantize.format=fp8,int8_sq", "quantize.group_size=0", "stages=[]",
    "stages=[report]", "export.targets=[]", "calibration.data=/", "calibration.data=/dev",
)  # fmt: skip


def _questions(case: Case) -> dict[str, Any]:
    return json.loads((case.data / "questions.json").read_text())


def _write(case: Case, questions: Any) -> None:
    (case.data / "questions.json").write_text(dump(questions))


def change_question(rng: random.Random, case: Case) -> str:
    """Give a value of a question another type, or remove it."""
    questions = _questions(case)
    place, key = rng.choice(nodes(questions))
    value = rng.choice(VALUES)
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = value
    _write(case, questions)
    return f"questions.json question {key} {value!r}"


def change_text(rng: random.Random, case: Case) -> str:
    """Ask or answer something odd."""
    questions, text = _questions(case), rng.choice(TEXTS)
    key = rng.choice(("question", "answer"))
    for question in questions.values():
        question[key] = text
    _write(case, questions)
    return f"questions.json question {key} {text!r}"[:100]


def change_image_id(rng: random.Random, case: Case) -> str:
    """Name an image that is elsewhere, or in another type."""
    questions, name = _questions(case), rng.choice(IMAGE_IDS)
    for question in questions.values():
        question["imageId"] = name
    _write(case, questions)
    return f"questions.json images imageId {name!r}"[:100]


def damage_questions(rng: random.Random, case: Case) -> str:
    """Damage the bytes of the file of questions."""
    path = case.data / "questions.json"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    kinds = {
        "flipped": bytes(flipped), "cut": content[: rng.randrange(len(content))], "empty": b"",
        "null": b"null", "list": b"[" + content + b"]", "bom": b"\xef\xbb\xbf" + content,
        "utf16": content.decode().encode("utf-16"), "lfs": LFS, "deep": b'{"a":' * 100_000,
        "twice": b'{"q0": {},' + content[1:], "object": b"{}", "number": b"9" * 10_000,
    }  # fmt: skip
    kind = rng.choice(sorted(kinds))
    path.write_bytes(kinds[kind])
    return f"questions.json {kind}, data"


def replace_data(rng: random.Random, case: Case) -> str:
    """Put something else in place of the questions, an image or the folder of images."""
    path = rng.choice(
        (case.data / "questions.json", case.data / "images/i0.png", case.data / "images")
    )
    aside = case.folder / "aside"
    path.rename(aside)
    kind = rng.choice(("gone", "copy", "loop", "pipe", "folder", "device", "file"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"x")
    elif kind != "gone":
        path.symlink_to({"copy": aside, "loop": path, "device": "/dev/zero"}[kind])
    return f"{path.name} data images is a {kind}"


def damage_image(rng: random.Random, case: Case) -> str:
    """Cut an image or flip some of its bits."""
    path = pick(rng, case.data / "images", "*.*")
    assert path is not None
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        del content[rng.choice((0, 1, 8, len(content) // 2, len(content) - 1)) :]
    else:
        for _ in range(rng.choice((1, 5))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name} damaged"


def _png(width: int, height: int, depth: int, color: int, data: bytes, more: bytes = b"") -> bytes:
    """Return a PNG file of a header and anything."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def change_image(rng: random.Random, case: Case) -> str:
    """Replace an image by one of another kind or size, or under another suffix."""
    path = case.data / "images" / "i0.png"
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr")
    kinds = (
        "huge",
        "bomb",
        "text",
        "depth",
        "line",
        "dot",
        "animated",
        "suffix",
        "exif",
        "tiff",
        *modes,
    )
    kind, images = rng.choice(kinds), path.parent
    path.unlink()
    small = Image.radial_gradient("L").resize((40, 30))
    if kind in modes:
        formats = {"CMYK": "JPEG", "F": "TIFF", "I": "TIFF", "YCbCr": "JPEG"}
        image = small.point(lambda value: value * 200, "I") if kind == "I;16" else small
        image.convert(kind).save(path, formats.get(kind, "PNG"))
    elif kind == "huge":
        path.write_bytes(_png(rng.choice((2**31 - 1, 60_000)), 60_000, 8, 2, b""))
    elif kind == "bomb":
        path.write_bytes(_png(8000, 8000, 8, 2, b"\0" * (24001 * 8000)))
    elif kind == "text":
        text = b"a\0\0" + zlib.compress(b"x" * (1 << 27))
        more = struct.pack(">I", len(text)) + b"zTXt" + text
        more += struct.pack(">I", zlib.crc32(b"zTXt" + text))
        path.write_bytes(_png(40, 30, 8, 0, b"\0" * (41 * 30), more))
    elif kind == "depth":
        path.write_bytes(_png(4, 4, 16, 2, b"\0" + b"\1\2" * 48))
    elif kind in ("line", "dot"):
        Image.new("RGB", (1 if kind == "dot" else 2000, 1)).save(path)
    elif kind == "animated":
        frames = [small.rotate(90 * number) for number in range(3)]
        frames[0].save(
            path, rng.choice(("GIF", "WEBP", "PNG")), save_all=True, append_images=frames
        )
    elif kind == "suffix":
        small.convert("RGB").save(images / "i0.jpg", "PNG")
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = rng.choice((6, 3, 0, 99, 65535))
        small.convert("RGB").save(path, "JPEG", exif=exif)
    else:
        small.save(path, "TIFF")
    return f"i0.png images {kind}"


# Recipes


def _is_section(tree: Any) -> bool:
    return isinstance(tree, dict)


def change_recipe(rng: random.Random, case: Case) -> str | None:
    """Give a key of a recipe a value of any type, or add an unknown key."""
    key = rng.choice(recipe_keys())
    if key in ("model", "workdir", "stages") and rng.random() < 0.7:
        return None
    if rng.random() < 0.15:
        key += rng.choice(("x", ".x", "_", "\n"))
    *parents, last = key.split(".")
    part: Any = case.tree
    for parent in parents:
        part = part.setdefault(parent, {})
        if not _is_section(part):
            return None
    part[last] = value = rng.choice([one for one in VALUES if not str(one).startswith("raw:")])
    return f"recipe key {key!r} {value!r}"


def override(rng: random.Random, case: Case) -> str:
    """Set a key on the command line to a text that YAML takes for something else."""
    more = ("config.x", "config.text_config.rms_norm_eps", "config.vision_config.hidden_size")
    key, text = rng.choice((*recipe_keys(), *more)), rng.choice(WORDS)
    case.overrides.append(f"{key}={text}")
    return f"recipe override {key}={text}"[:100]


def damage_recipe(rng: random.Random, case: Case) -> str:
    """Damage the bytes of the recipe."""
    content = json.dumps(case.tree, indent=1).encode()
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 3))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    bomb = "a: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    nested = f"model: m\nworkdir: w\nconfig:\n  {bomb}".replace("\n", "\n  ").encode()
    kinds = {
        "nested bomb": nested.replace(b"  workdir", b"workdir").replace(b"  config", b"config"),
        "flipped": bytes(flipped), "cut": content[: rng.randrange(len(content))], "empty": b"",
        "list": b"- a", "text": b"model", "bom": b"\xef\xbb\xbf" + content, 
        "twice": b"model: a\nmodel: b",
        "utf16": content.decode().encode("utf-16"), 
        "tabs": b"model:\n\t- a", "deep": b"[" * 100_000,
        "two": b"a: 1\n---\nb: 2", "python": b"model: !!python/object/apply:os.getcwd []",
        "bomb": bomb.encode(), "itself": b"model: &a [*a]", "merge": b"<<: [1]\nmodel: a",
        "integer": b"1: 2", "nul": b"model: \0", "binary": b"\xff\xfe\0\0", "lfs": LFS,
        "tag": b"model: !x y", "config itself": content[:-1] + b',"config": &a {"x": *a}}',
        "deep config": content[:-1] + b',"config": ' + b'{"a":' * 400 + b"1" + b"}" * 401,
    }  # fmt: skip
    kind = rng.choice(sorted(kinds))
    case.recipe.write_bytes(kinds[kind])
    return f"recipe {kind}"


def replace_recipe(rng: random.Random, case: Case) -> str:
    """Put something else in place of the recipe."""
    kind = rng.choice(("gone", "folder", "pipe", "loop", "device"))
    if kind == "folder":
        case.recipe.mkdir()
    elif kind == "pipe":
        os.mkfifo(case.recipe)
    elif kind != "gone":
        case.recipe.symlink_to({"loop": case.recipe, "device": "/dev/zero"}[kind])
    return f"recipe is a {kind}"


def change_words(rng: random.Random, case: Case) -> str:
    """Add words to the command line, or name another command."""
    if rng.random() < 0.2:
        case.command = rng.choice(COMMANDS)
    case.overrides += rng.sample(OPTIONS, rng.choice((1, 1, 2)))
    return f"recipe command {case.command} {case.overrides}"


INPUT_DAMAGES: tuple[Damage, ...] = (
    change_question, change_text, change_image_id, damage_questions, replace_data, damage_image,
    change_image, change_recipe, override, damage_recipe, replace_recipe, change_words,
)  # fmt: skip
