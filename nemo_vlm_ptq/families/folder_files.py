"""Tokenizer and image processor files of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without remote code. Several threads may call it.

    Raises:
        UserError: the folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{folder} has no tokenizer.json or tokenizer.model; one is required to preprocess "
            "questions"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The first call changes the truncation and padding state of the tokenizer, which is not safe
    # while other threads call it.
    tokenizer("")
    return tokenizer


def require_image_processor(folder: Path) -> None:
    """Require image processor settings in either of the files that transformers reads.

    Raises:
        UserError: the folder has no settings.
    """
    path = folder / "processor_config.json"
    if not (path.is_file() and "image_processor" in read_json_object(path)):
        require_file(folder, "preprocessor_config.json")


def require_file(folder: Path, name: str) -> Path:
    """Return the path of a file of a model folder.

    Raises:
        UserError: the file does not exist.
    """
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}; it is required to preprocess questions")
    return folder / name
