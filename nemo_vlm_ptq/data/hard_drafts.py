"""What questions about hard scenes are made of: names of objects, counts, drafts."""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

from nemo_vlm_ptq.data.hard_scenes import HALF_SIZES, SHAPES, HardObject, HardScene
from nemo_vlm_ptq.data.scene_questions import Draft, Step
from nemo_vlm_ptq.data.scenes import COLORS

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATTRIBUTES = ("size", "color", "shape")
KEYS = [keys for count in (1, 2, 3) for keys in combinations(ATTRIBUTES, count)]
ATTRIBUTE_VALUES: dict[str, Iterable[str]] = {"size": HALF_SIZES, "color": COLORS, "shape": SHAPES}
Values = tuple[tuple[str, str], ...]  # (attribute, value) of a description


class Scene(NamedTuple):
    """A scene with what its objects can be called.

    counts: description -> objects that it fits.
    """

    objects: tuple[HardObject, ...]
    scene: HardScene
    counts: Counter[Values]


def describe(scene: HardScene) -> Scene:
    """Count the objects that each description fits."""
    counts = Counter(values_of(item, keys) for item in scene.objects for keys in KEYS)
    return Scene(scene.objects, scene, counts)


def values_of(item: HardObject, keys: tuple[str, ...]) -> Values:
    """Return the description of an object by some of its attributes."""
    return tuple((key, getattr(item, key)) for key in keys)


def noun_of(values: Values, plural: bool = False) -> str:
    """Return "large red circle", "red objects"."""
    words = [value for _, value in values]
    if values[-1][0] != "shape":
        words.append("object")
    if plural:
        words[-1] += "es" if words[-1] == "cross" else "s"
    return " ".join(words)


def name_of(scene: Scene, item: HardObject, rng: random.Random, hidden: str = "") -> str | None:
    """Return a description that fits the object only, without the attribute `hidden`."""
    options = [
        values
        for keys in KEYS
        if hidden not in keys and scene.counts[values := values_of(item, keys)] == 1
    ]
    return noun_of(rng.choice(options)) if options else None


def make_draft(types: str, question: str, answer: str, *subjects: str) -> Draft:
    """Return a draft whose program selects its subjects."""
    steps = [Step("select", [], subject) for subject in subjects]
    steps.append(Step(types.split()[0], list(range(len(subjects))), types.split()[2]))
    return Draft(types, question, answer, f"The answer is {answer}.", steps)


def balanced(options: dict[Values, int], rng: random.Random) -> Values:
    """Choose a description so that all counts are about as frequent."""
    count = rng.choice(sorted(set(options.values())))
    return rng.choice([values for values, number in options.items() if number == count])


def countable(scenes: tuple[Scene, ...], keys: tuple[str, ...]) -> dict[Values, int]:
    """Return description -> number of objects, from zero to nine."""
    values: list[Values] = [()]
    for key in keys:
        names = ATTRIBUTE_VALUES[key]
        values = [(*value, (key, name)) for value in values for name in names]
    counts = {value: sum(scene.counts[value] for scene in scenes) for value in values}
    return {value: count for value, count in counts.items() if count < len(NUMBERS)}
