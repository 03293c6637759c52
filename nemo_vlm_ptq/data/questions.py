"""Questions about images in the file format of GQA, for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from nemo_vlm_ptq.data.drawn import LEVELS, drawn_questions
from nemo_vlm_ptq.data.images import check_image, image_file, open_image
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import is_folder, read_json, shorten

if TYPE_CHECKING:
    from nemo_vlm_ptq.recipe import Calibration

# The instruction of LLaVA and VILA for GQA.
PROMPT_SUFFIX = "\nAnswer the question using a single word or phrase."
MAX_IMAGES = 64  # of a question


@dataclass(frozen=True)
class Question:
    """One question.

    id: key of the question in the file.
    images: ids of its images, in order.
    text: the question.
    answer: the reference answer.
    question_type: GQA's types.detailed; "other" if the file has none.
    """

    id: str
    images: tuple[str, ...]
    text: str
    answer: str
    question_type: str

    def record(self) -> dict[str, Any]:
        """Return the fields under the keys that Questions.identity hashes."""
        several = len(self.images) > 1
        return {
            "id": self.id,
            "image": list(self.images) if several else "".join(self.images),
            "text": self.text,
            "answer": self.answer,
            "kind": self.question_type,
        }


@dataclass(frozen=True)
class Questions:
    """Questions in a fixed order and a function that loads their images.

    name: the name of drawn scenes, or the folder as the recipe has it.
    items: the questions.
    load_image: image id -> image.
    folder: the folder; None for drawn scenes.
    """

    name: str
    items: tuple[Question, ...]
    load_image: Callable[[str], PIL.Image.Image]
    folder: Path | None = None

    def identity(self) -> str:
        """Return the sha256 of the questions and of size and mtime of their image files.

        Raises:
            UserError: an image does not exist.
        """
        digest = hashlib.sha256(json.dumps([item.record() for item in self.items]).encode())
        if self.folder is not None:
            for name in self.image_names():
                status = image_file(self.folder, name).stat()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def image_names(self) -> list[str]:
        """Return the ids of all images, each once."""
        return sorted({name for item in self.items for name in item.images})

    def load_images(self, item: Question) -> list[PIL.Image.Image]:
        """Return the images of a question, in order."""
        return [self.load_image(name) for name in item.images]

    def check_images(self) -> None:
        """Check the headers of all image files.

        Raises:
            UserError: an image does not exist, or cannot be used.
        """
        if self.folder is not None:
            for name in self.image_names():
                check_image(image_file(self.folder, name))

    def require_images(self, remedy: str) -> Questions:
        """Return the questions; every one must have the id of an image.

        Args:
            remedy: what the user can do otherwise, for the message.

        Raises:
            UserError: questions have none.
        """
        without_image = [item.id for item in self.items if not item.images]
        if without_image:
            raise UserError(
                f"{len(without_image)} of {len(self.items)} questions of {self.name} have no "
                f"imageId, first {without_image[0]!r}; {remedy}"
            )
        return self


def calibration_questions(calibration: Calibration) -> Questions:
    """Return the questions of the calibration data.

    Raises:
        UserError: calibration.data is not set, there are fewer than calibration.samples, or
            questions without an image where calibration.modality requires images.
    """
    if calibration.data is None:
        raise UserError(
            "calibration.data is not set: give a folder with questions in GQA's format and images "
            "like those that the model will be served; drawn scenes suit only the models in assets/"
        )
    questions = load_questions(
        calibration.data, "calibration", calibration.samples, calibration.seed
    )
    if len(questions.items) < calibration.samples:
        raise UserError(
            f"calibration.samples={calibration.samples} but {calibration.data} has only "
            f"{len(questions.items)} questions"
        )
    if calibration.modality == "text":
        items = tuple(replace(item, images=()) for item in questions.items)
        return replace(questions, items=items)
    return questions.require_images(
        "calibration without images lowers accuracy on images: add images, or set "
        "calibration.modality=text"
    )


def evaluation_questions(data: str | None, limit: int | None) -> Questions:
    """Return the questions of the evaluation data.

    Raises:
        UserError: there is no data, or questions have no image.
    """
    if data is None:
        raise UserError(
            "evaluate.data is not set: give a folder with questions in GQA's format and images, or "
            "remove evaluate from stages"
        )
    questions = load_questions(data, "test", limit)
    return questions.require_images("evaluation requires an image for each question: add images")


def load_questions(data: str, split: str, limit: int | None, seed: int = 0) -> Questions:
    """Load the balanced questions of drawn scenes or of a folder.

    They are kept: the settings of each format and stage name them, and a file may be large.

    Args:
        data: "scenes", "hard_scenes", or a folder with one .json file of questions in GQA's format
            and the images images/ID.jpg (or another suffix of image_file).
        split: "calibration" or "test"; ignored for a folder.
        limit: the largest number of questions, sampled from all; None for all.
        seed: seed of the sampling.

    Raises:
        UserError: the folder or its file of questions does not exist, there are several files, or
            a file is not in GQA's format.
    """
    stamp = None
    if data not in LEVELS:
        status = questions_file(Path(data)).stat()
        stamp = status.st_size, status.st_mtime_ns, status.st_ino
    return _load_questions(data, split, limit, seed, stamp)


@lru_cache(maxsize=4)
def _load_questions(
    data: str, split: str, limit: int | None, seed: int, _: tuple[int, ...] | None
) -> Questions:
    """Load questions; the last argument tells a file from a later one of the same name."""
    if data in LEVELS:
        folder, (raw, load_image) = None, drawn_questions(data, split, limit)
    else:
        folder = Path(data)
        raw, load_image = _read_questions(folder), partial(open_image, folder)
    parsed = (_parse_question(data, name, entry) for name, entry in raw.items())
    items = [item for item in parsed if item is not None]
    if limit is not None and limit < len(items):
        chosen = set(random.Random(seed).sample(range(len(items)), limit))
        items = [item for i, item in enumerate(items) if i in chosen]
    return Questions(name=data, items=tuple(items), load_image=load_image, folder=folder)


def _parse_question(data: str, name: str, entry: Any) -> Question | None:
    """Parse a question of a file; None if it is not of GQA's balanced set.

    Raises:
        UserError: it is not in GQA's format.
    """
    try:
        if not isinstance(entry, dict):
            raise TypeError(f"expected an object, got {shorten(repr(entry))}")
        balanced = entry.get("isBalanced", True)
        if not isinstance(balanced, bool):
            raise TypeError(f"isBalanced must be true or false, got {shorten(repr(balanced))}")
        if not balanced:
            return None
        text, answer = entry["question"], entry["answer"]
        if not isinstance(text, str) or type(answer) not in (str, int, float):
            raise TypeError("question must be a string, answer a string or a number")
        question_type = (entry.get("types") or {}).get("detailed") or "other"
        question = Question(
            id=name,
            images=_parse_images(entry.get("imageId")),
            text=text,
            answer=str(answer),
            question_type=str(question_type),
        )
        # Raises UnicodeEncodeError for lone surrogates.
        json.dumps(question.record(), ensure_ascii=False).encode()
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{questions_file(Path(data))}: question {name!r} is not in GQA's format: {reason}"
        ) from None
    return question


def _parse_images(value: Any) -> tuple[str, ...]:
    """Return the ids of an imageId: null, one id, or a list of ids.

    Raises:
        TypeError: it is none of them.
    """
    if value is None or value == "":
        return ()
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(name) not in (str, int) or name == "" for name in ids):
        raise TypeError(
            "imageId must be a string, an integer, or a list of them with one for each image, got "
            f"{shorten(repr(value))}"
        )
    if len(ids) > MAX_IMAGES:
        raise TypeError(f"imageId may name {MAX_IMAGES} images, got {len(ids)}")
    return tuple(map(str, ids))


def questions_file(folder: Path) -> Path:
    """Return the path of the file of questions of a data folder.

    Raises:
        UserError: the folder does not exist, or does not have exactly one .json file.
    """
    if not is_folder(folder):
        names = ", ".join(map(repr, LEVELS))
        raise UserError(f"data must be {names} or an existing folder, got {shorten(str(folder))!r}")
    files = sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise UserError(f"{folder} must hold exactly one .json file of questions, got {len(files)}")
    return files[0]


def _read_questions(folder: Path) -> dict[str, Any]:
    path = questions_file(folder)
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} is not in GQA's format: expected an object with question ids as keys, got "
            f"{type(raw).__name__}"
        )
    return raw
