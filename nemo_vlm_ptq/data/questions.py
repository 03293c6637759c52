"""Questions about images, in GQA's own file format: for calibration and for evaluation alike."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from nemo_vlm_ptq.errors import UserError

if TYPE_CHECKING:
    from nemo_vlm_ptq.recipe import Calibration

PROMPT_SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's, VILA's for GQA
IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "JPG", "PNG", "JPEG", "WEBP")  # of pictures


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
    """Questions in a fixed order, and how to get their images by id; folder: None for scenes."""

    name: str
    items: tuple[Question, ...]
    image: Callable[[str], PIL.Image.Image]
    folder: Path | None = None

    def identity(self) -> str:
        """sha256 over the questions, and size and time of every image that they are about.

        Raises:
            UserError: an image is not there.
        """
        digest = hashlib.sha256(json.dumps([asdict(item) for item in self.items]).encode())
        if self.folder is not None:
            for name in sorted({item.image for item in self.items if item.image}):
                status = _image_file(self.folder, name).stat()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def require_images(self, instead: str) -> Questions:
        """The questions, each with the id of an image.

        Raises:
            UserError: some have none; says what may be done `instead`.
        """
        blind = [item.id for item in self.items if not item.image]
        if blind:
            raise UserError(
                f"{len(blind)} of {len(self.items)} questions of {self.name} have no imageId, "
                f"first {blind[0]!r}; {instead}"
            )
        return self


def calibration_questions(wanted: Calibration) -> Questions:
    """The questions that observe runs the model over.

    Raises:
        UserError: fewer than samples, or questions without an image where images are asked for.
    """
    questions = load_questions(wanted.data, "calibration", wanted.samples, wanted.seed)
    if len(questions.items) < wanted.samples:
        raise UserError(
            f"calibration.samples={wanted.samples} but {wanted.data} has only "
            f"{len(questions.items)} questions"
        )
    if wanted.modality == "text":
        items = tuple(replace(item, image="") for item in questions.items)
        return replace(questions, items=items)
    return questions.require_images(
        "a model calibrated without images may lose them: add images, or set "
        "calibration.modality=text"
    )


def evaluation_questions(data: str, limit: int | None) -> Questions:
    """The questions that models are scored with.

    Raises:
        UserError: questions without an image.
    """
    questions = load_questions(data, "test", limit)
    return questions.require_images("models are scored on questions about images")


def load_questions(data: str, split: str, limit: int | None, seed: int = 0) -> Questions:
    """Balanced questions of the built-in scenes or of a folder.

    Args:
        data: "scenes", or a folder with one questions .json in GQA's format and images/ID.jpg.
        split: "calibration" or "test"; only the scenes have both.
        limit: at most so many, drawn with `seed` over all; None takes all in their order.

    Raises:
        UserError: no such folder, no questions file, more than one, or one of another format.
    """
    if data == "scenes":
        from nemo_vlm_ptq.data import scenes

        count = 250 if limit is None else max(250, -(-limit // 8))
        folder, raw = None, scenes.questions(split, count)
        image: Callable[[str], PIL.Image.Image] = scenes.draw
    else:
        folder = Path(data)
        raw, image = _read_questions(folder), partial(_open_image, folder)
    read = (_question(data, name, entry) for name, entry in raw.items())
    items = [item for item in read if item is not None]
    if limit is not None and limit < len(items):
        chosen = set(random.Random(seed).sample(range(len(items)), limit))
        items = [item for i, item in enumerate(items) if i in chosen]
    return Questions(data, tuple(items), image, folder)


def _question(data: str, name: str, entry: Any) -> Question | None:
    """A balanced question of a file, or None.

    Raises:
        UserError: it is not in GQA's format.
    """
    try:
        if not entry.get("isBalanced", True):
            return None
        text, answer = entry["question"], entry["answer"]
        if not isinstance(text, str) or not isinstance(answer, str | int | float):
            raise TypeError("question and answer must be text")
        kind = (entry.get("types") or {}).get("detailed") or "other"
        found = Question(name, str(entry.get("imageId") or ""), text, str(answer), str(kind))
        json.dumps(asdict(found), ensure_ascii=False).encode()
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{questions_file(Path(data))}, question {name!r}, is not in GQA's format: {reason}"
        ) from None
    return found


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


def _read_questions(folder: Path) -> dict[str, Any]:
    path = questions_file(folder)
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not in GQA's format: an object, id -> question")
    return raw


def _image_file(folder: Path, name: str) -> Path:
    for ending in IMAGE_SUFFIXES:
        path = folder / "images" / f"{name}.{ending}"
        if path.is_file():
            return path
    raise UserError(f"{folder}/images has no {name}.jpg, .png, .jpeg or .webp")


def _open_image(folder: Path, name: str) -> PIL.Image.Image:
    path = _image_file(folder, name)
    try:
        return PIL.Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no readable picture: {error}") from None
