"""Tokenizer and image processor files of a model folder."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.checkpoints.model_folder import TOKENIZER_FILES
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import one_line, open_file

_silencing = threading.Lock()  # the descriptors are those of all threads


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without remote code. Several threads may call it.

    Raises:
        UserError: the folder has no tokenizer, or one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{folder} has no tokenizer.json or tokenizer.model; one is required to preprocess "
            "questions"
        )
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.exists():
            read_json_object(path) if path.suffix == ".json" else open_file(path).close()
    try:
        with _silencing, _silent_descriptors():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # The first call changes the truncation and padding state of the tokenizer, which is
            # not safe while other threads call it.
            tokenizer("")
    except BaseException as error:  # the library is in Rust, whose panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {one_line(error)}") from None
    return tokenizer


def token_of_id(folder: Path, tokenizer: Any, key: str, token_id: int) -> str:
    """Return the token that config.json names by its id.

    Raises:
        UserError: the tokenizer has no such token.
    """
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        raise UserError(f"{folder}: the tokenizer has no token with {key} {token_id}")
    return str(token)


@contextmanager
def _silent_descriptors() -> Iterator[None]:
    """Drop what a library in Rust prints past sys.stdout and sys.stderr: panics, and warnings."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept: dict[int, int] = {}
    for number in (1, 2):
        with suppress(OSError):  # it may be closed
            kept[number] = os.dup(number)
    try:
        with open(os.devnull, "wb") as nowhere:
            for number in kept:
                os.dup2(nowhere.fileno(), number)
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def require_file(folder: Path, name: str) -> Path:
    """Return the path of a file of a model folder.

    Raises:
        UserError: the file does not exist.
    """
    if not (folder / name).exists():
        raise UserError(f"{folder} has no {name}; it is required to preprocess questions")
    return folder / name
