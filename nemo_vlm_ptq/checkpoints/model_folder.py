"""Which files of a model folder are read and handed on, and where they may lie.

A model folder is downloaded: a link in it must not bring a file of this machine into an export.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import is_folder, open_file, read_json, read_text, resolve

CONFIG_FILE = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", *CHAT_TEMPLATE_FILES)
SIDECARS = (CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)
# Code of the model's own classes, which servers run and this package never does.
CODE_FILE = re.compile(r"(configuration|modeling|processing|image_processing|tokenization)_\w+\.py")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Config files of quantized checkpoints; config.json has its own entry.
QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def is_sidecar(path: Path) -> bool:
    """Return whether a file belongs to the tokenizer, the processor, the configs or the code."""
    return path.name in SIDECARS or CODE_FILE.fullmatch(path.name) is not None


def is_weight_file(path: Path) -> bool:
    """Return whether readers take a file as weights: not hidden, not Mistral's or an adapter's."""
    others = ("consolidated", "adapter_", ".")
    return path.suffix == ".safetensors" and not path.name.startswith(others)


def check_model_folder(folder: Path, subfolders: Iterable[str] = ("",)) -> None:
    """Check that every file that is read or handed on is a readable file of this folder.

    Raises:
        UserError: a file is a link out of the folder, no regular file, unreadable or a pointer of
            git-lfs, or text that is none; the folder holds a LoRA adapter, or a quantized model.
    """
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            raise UserError(
                f"{folder} holds {name}, a LoRA adapter, which is not applied here; merge it into "
                "the model first (merge_and_unload of peft), or remove it"
            )
    for subfolder in dict.fromkeys(("", *subfolders)):
        part = folder / subfolder
        if not is_folder(part):
            continue
        for path in sorted(part.iterdir()):
            if path.name in QUANTIZED_FILES:
                raise UserError(f"{path}: the model is already quantized; start from one in 16 bit")
            if is_sidecar(path) or is_weight_file(path) or path.name.endswith(".index.json"):
                check_file(path, folder)
            if is_sidecar(path):
                _check_content(path)


def _check_content(path: Path) -> None:
    """Check that a file that exports get a copy of is what servers can read.

    Raises:
        UserError: it is not text in UTF-8, or not a JSON object.
    """
    if path.suffix in (".model", ".py"):
        return
    if read_text(path).startswith("\ufeff"):
        raise UserError(f"{path} starts with a byte order mark; save it in UTF-8 without one")
    if path.suffix == ".json" and not isinstance(content := read_json(path), dict):
        found = type(content).__name__
        raise UserError(f"{path} is not valid JSON: expected an object, got {found}")


def check_file(path: Path, folder: Path) -> None:
    """Check that a path is a readable regular file of a model folder.

    Links may lead to files of the folder. In the cache of the Hub, models--X/snapshots/REVISION/
    holds links to models--X/blobs/.

    Raises:
        UserError: it is not.
    """
    target, home = resolve(path), resolve(folder)
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
    if not any(target.is_relative_to(one) for one in homes):
        raise UserError(
            f"{path} leads to {target}, outside the model folder; replace the link by a copy"
        )
    open_file(path).close()
