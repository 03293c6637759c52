"""Questions about the synthetic scenes, in the file format of GQA.

Questions are a function of the image id, as scenes are. Objects are referred to by attributes that
are unique in the scene, so that each question has one answer.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from nemo_vlm_ptq.data.scenes import (
    COLORS,
    SHAPES,
    SceneObject,
    generate_scene,
    seeded_random,
    shuffled,
)

MIN_OFFSET = 8.0  # pixels between centres; closer objects are not compared
NUMBERS = ("zero", "one", "two", "three", "four")
COUNT_WEIGHTS = (1.0, 1.0, 1.6, 4.0, 9.0, 0.0)  # balances the answers to "how many"


class Relation(NamedTuple):
    """A spatial relation: its words, the coordinate and its sign, and the opposite answer."""

    phrase: str
    axis: str
    sign: int
    opposite: str


RELATIONS = {  # answer -> relation
    "left": Relation(phrase="to the left of", axis="x", sign=-1, opposite="right"),
    "right": Relation(phrase="to the right of", axis="x", sign=1, opposite="left"),
    "above": Relation(phrase="above", axis="y", sign=-1, opposite="below"),
    "below": Relation(phrase="below", axis="y", sign=1, opposite="above"),
}


class Step(NamedTuple):
    """One step of GQA's functional program."""

    operation: str
    dependencies: list[int]
    argument: str


class Draft(NamedTuple):
    """A question without ids; types: GQA's structural, semantic and detailed type."""

    types: str
    question: str
    answer: str
    full_answer: str
    program: list[Step]


def questions(split: str, scenes: int, first: int = 0) -> dict[str, dict]:
    """Return questions about scenes `first` to `first + scenes - 1` of a split, by question id.

    A scene has about ten questions.
    """
    entries = {}
    for index in range(first, first + scenes):
        image_id = f"{split}-{index:06d}"
        for number, draft in enumerate(_draft_questions(image_id)):
            question_id = f"{image_id}-{number:02d}"
            entries[question_id] = gqa_entry(draft, image_id, question_id)
    return entries


def _draft_questions(image_id: str) -> list[Draft]:
    """Draft the questions of one scene, without duplicates."""
    objects, _ = generate_scene(image_id)
    rng = seeded_random(f"questions {image_id}")
    drafts: dict[str, Draft] = {}
    for generate, count in QUESTION_TYPES:
        for draft in shuffled(generate(objects, rng), rng)[:count]:
            drafts.setdefault(draft.question, draft)
    return list(drafts.values())


def _unique(objects: list[SceneObject], attribute: str) -> list[SceneObject]:
    """Return the objects whose value of an attribute is unique in the scene."""
    counts = Counter(getattr(item, attribute) for item in objects)
    return [item for item in objects if counts[getattr(item, attribute)] == 1]


def _offset(item: SceneObject, other: SceneObject, side: str) -> float:
    """Return how far, in pixels, an object lies to that side of another."""
    relation = RELATIONS[side]
    return relation.sign * (getattr(item, relation.axis) - getattr(other, relation.axis))


def _select(item: SceneObject) -> Step:
    """Return the program step that selects an object by its name."""
    return Step("select", [], f"{item.name} ({item.index})")


def _query_drafts(objects: list[SceneObject], rng: random.Random, attribute: str) -> list[Draft]:
    """Draft "What color is the circle?" or "What shape is the red object?"."""
    drafts: list[Draft] = []
    for item in _unique(objects, "shape" if attribute == "color" else "color"):
        name = item.shape if attribute == "color" else f"{item.color} object"
        answer, article = getattr(item, attribute), "a " if attribute == "shape" else ""
        drafts.append(
            Draft(
                types=f"query attr {attribute}Query",
                question=f"What {attribute} is the {name}?",
                answer=answer,
                full_answer=f"The {name} is {article}{answer}.",
                program=[
                    Step("select", [], f"{name} ({item.index})"),
                    Step("query", [0], attribute),
                ],
            )
        )
    return drafts


def _count_drafts(objects: list[SceneObject], rng: random.Random, by: str) -> list[Draft]:
    """Draft "How many circles are there?" or "How many red objects are there?"."""
    names = list(COLORS if by == "color" else SHAPES)
    counts = [sum(getattr(item, by) == name for item in objects) for name in names]
    name = rng.choices(names, [COUNT_WEIGHTS[n] / counts.count(n) for n in counts])[0]
    plural = name + ("es" if name == "cross" else "s")
    counted = plural if by == "shape" else f"{name} objects"
    indices = ",".join(str(item.index) for item in objects if getattr(item, by) == name) or "-"
    answer = NUMBERS[counts[names.index(name)]]
    return [
        Draft(
            types=f"query obj {by}Count",
            question=f"How many {counted} are there?",
            answer=answer,
            full_answer=f"The number of {counted} is {answer}.",
            program=[Step("select", [], f"{counted} ({indices})"), Step("count", [0], "")],
        )
    ]


def _related_drafts(objects: list[SceneObject], rng: random.Random, attribute: str) -> list[Draft]:
    """Draft "What color is the object to the left of the red circle?".

    The relation must hold for one object only.
    """
    drafts = []
    for other in _unique(objects, "name"):
        for side, relation in RELATIONS.items():
            on_side = [item for item in objects if _offset(item, other, side) > 0]
            if len(on_side) != 1 or _offset(on_side[0], other, side) < MIN_OFFSET:
                continue
            phrase = relation.phrase
            place = f"object {phrase} the {other.name}"
            answer, article = getattr(on_side[0], attribute), "a " if attribute == "shape" else ""
            drafts.append(
                Draft(
                    types=f"query rel {attribute}Related",
                    question=f"What {attribute} is the {place}?",
                    answer=answer,
                    full_answer=f"The {place} is {article}{answer}.",
                    program=[
                        _select(other),
                        Step("relate", [0], f"object,{phrase},s ({on_side[0].index})"),
                        Step("query", [1], attribute),
                    ],
                )
            )
    return drafts


def _related_pairs(objects: list[SceneObject]) -> list[tuple[SceneObject, SceneObject, str]]:
    """Return (object, other, side) for all objects of unique names at least MIN_OFFSET apart."""
    named = _unique(objects, "name")
    sides = [(a, b, side) for a in named for b in named for side in RELATIONS]
    return [(a, b, side) for a, b, side in sides if _offset(a, b, side) >= MIN_OFFSET]


def _compare_drafts(objects: list[SceneObject], rng: random.Random, verify: bool) -> list[Draft]:
    """Draft "Is the red circle above or below the blue square?".

    verify: ask for one side instead, "Is the red circle above the blue square?".
    """
    drafts = []
    for item, other, side in _related_pairs(objects):
        phrase, axis, _, opposite = RELATIONS[side]
        structural, answer, false = "choose", side, RELATIONS[opposite].phrase
        wording = "to the left or to the right of" if axis == "x" else "above or below"
        if verify:
            structural, answer = "verify", rng.choice(("yes", "no"))
            wording = phrase if answer == "yes" else false
        choices = wording if verify else f"{phrase}|{false}"
        drafts.append(
            Draft(
                types=f"{structural} rel {structural}Relation",
                question=f"Is the {item.name} {wording} the {other.name}?",
                answer=answer,
                full_answer=f"The {item.name} is {phrase} the {other.name}.",
                program=[
                    _select(other),
                    Step(f"{structural} rel", [0], f"{item.name},{choices},s ({item.index})"),
                ],
            )
        )
    return drafts


def _exist_drafts(objects: list[SceneObject], rng: random.Random) -> list[Draft]:
    """Draft "Is there a green cross?".

    If there is none, the scene has another green object and another cross.
    """
    present = {item.name: str(item.index) for item in objects}
    mixed = {f"{a.color} {b.shape}": "-" for a in objects for b in objects if a is not b}
    absent = {name: index for name, index in mixed.items() if name not in present}
    candidates = rng.choice((present, absent or present))
    name = rng.choice(list(candidates))
    noun = f"an {name}" if name[0] == "o" else f"a {name}"
    return [
        Draft(
            types="verify obj exist",
            question=f"Is there {noun}?",
            answer="yes" if name in present else "no",
            full_answer=f"There is {noun}." if name in present else f"There is no {name}.",
            program=[Step("select", [], f"{name} ({candidates[name]})"), Step("exist", [0], "?")],
        )
    ]


def _verify_drafts(objects: list[SceneObject], rng: random.Random) -> list[Draft]:
    """Draft a question with the answer yes or no, about a relation or about existence."""
    generate = rng.choice((partial(_compare_drafts, verify=True), _exist_drafts))
    return generate(objects, rng)


def gqa_entry(draft: Draft, image_id: str | list[str], question_id: str) -> dict[str, Any]:
    """Return a question in the format of GQA's files."""
    structural, semantic, detailed = draft.types.split()
    program = [
        f"{step.operation}: {step.argument}" + "".join(f" [{d}]" for d in step.dependencies)
        for step in draft.program
    ]
    return {
        "imageId": image_id,
        "question": draft.question,
        "answer": draft.answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
        "semantic": [step._asdict() for step in draft.program],
        "semanticStr": "->".join(program),
        "groups": {"global": None, "local": f"{detailed}-{draft.program[0].argument}"},
        "fullAnswer": draft.full_answer,
        "entailed": [],
        "equivalent": [question_id],
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
    }


Generate = Callable[[list[SceneObject], random.Random], list[Draft]]
QUESTION_TYPES: tuple[tuple[Generate, int], ...] = (  # with the largest number for each scene
    (partial(_query_drafts, attribute="color"), 2),
    (partial(_query_drafts, attribute="shape"), 2),
    (partial(_count_drafts, by="shape"), 1),
    (partial(_count_drafts, by="color"), 1),
    (partial(_related_drafts, attribute="color"), 1),
    (partial(_related_drafts, attribute="shape"), 1),
    (partial(_compare_drafts, verify=False), 1),
    (_verify_drafts, 1),
)
