"""Questions about images, in GQA's own file format: for calibration and for evaluation alike."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from nemo_vlm_ptq.errors import UserError

SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's, VILA's for GQA


@dataclass(frozen=True)
class Question:
    """One question; `kind` is GQA's types.detailed, `image` is empty when it has none."""

    id: str
    image: str
    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Questions:
    """Questions in a fixed order, and how to get their images by id."""

    name: str
    items: tuple[Question, ...]
    image: Callable[[str], PIL.Image.Image]


def load_questions(data: str, split: str, limit: int | None, seed: int = 0) -> Questions:
    """Balanced questions of the built-in scenes or of a folder.

    Args:
        data: "scenes", or a folder with one questions .json in GQA's format and images/ID.jpg.
        split: "calibration" or "test"; only the scenes have both.
        limit: at most so many, drawn with `seed` over all; None takes all in their order.

    Raises:
        UserError: no such folder, no questions file, or more than one.
    """
    if data == "scenes":
        from nemo_vlm_ptq import scenes

        count = 250 if limit is None else max(250, -(-limit // 8))
        raw = scenes.questions(split, count)
        image: Callable[[str], PIL.Image.Image] = scenes.draw
    else:
        raw, image = _read_folder(Path(data))
    try:
        items = [
            Question(name, str(q.get("imageId", "")), q["question"], q["answer"], _kind(q))
            for name, q in raw.items()
            if q.get("isBalanced", True)
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{questions_file(Path(data))} is not in GQA's format: {error}") from None
    if limit is not None and limit < len(items):
        chosen = set(random.Random(seed).sample(range(len(items)), limit))
        items = [item for i, item in enumerate(items) if i in chosen]
    return Questions(data, tuple(items), image)


def _kind(question: dict[str, Any]) -> str:
    return str((question.get("types") or {}).get("detailed") or "other")


def questions_file(folder: Path) -> Path:
    """The one questions file of a data folder.

    Raises:
        UserError: no such folder, no questions file, or more than one.
    """
    if not folder.is_dir():
        raise UserError(f"data {str(folder)!r} is neither 'scenes' nor a folder")
    files = sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise UserError(f"{folder} must hold one questions .json, found {len(files)}")
    return files[0]


def _read_folder(folder: Path) -> tuple[dict[str, Any], Callable[[str], PIL.Image.Image]]:
    path = questions_file(folder)
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None

    def image(name: str) -> PIL.Image.Image:
        for ending in ("jpg", "png", "jpeg"):
            path = folder / "images" / f"{name}.{ending}"
            if path.is_file():
                try:
                    return PIL.Image.open(path).convert("RGB")
                except OSError as error:
                    raise UserError(f"{path} is no readable picture: {error}") from None
        raise UserError(f"{folder}/images has no {name}.jpg or {name}.png")

    return raw, image
