"""Synthetic scenes of coloured shapes, with questions about them in GQA's file format.

Everything is a function of the image's id ("test-000123"): the same id gives the same everywhere. A
scene belongs to the split that the hash of its inventory (which colours on which shapes) names.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image, ImageDraw

SIZE = 64
FINE = 4  # shapes are drawn this many times larger and averaged down
CLEAR = 8.0  # the least distance between centres, in pixels, that a relation is asked about
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 220, 50),
    "purple": (140, 45, 165),
    "orange": (245, 135, 25),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
NUMBERS = ("zero", "one", "two", "three", "four")
SPLIT_SHARES = {"test": range(1), "calibration": range(1, 2), "train": range(2, 10)}
# answer -> (how a question says it, the coordinate, the sign of that side, the opposite answer)
RELATIONS = {
    "left": ("to the left of", "x", -1, "right"),
    "right": ("to the right of", "x", 1, "left"),
    "above": ("above", "y", -1, "below"),
    "below": ("below", "y", 1, "above"),
}
Step = tuple[str, list[int], str]  # GQA's operation, dependencies, argument
# a question before it gets its id: GQA's three types, question, answer, full answer, program
Draft = tuple[str, str, str, str, list[Step]]
COUNT_WEIGHTS = (1.0, 1.0, 1.6, 4.0, 9.0, 0.0)  # evens out the answers to "how many"


@dataclass(frozen=True)
class Thing:
    """One object: its place in the scene's list, looks, centre and half its height, in pixels."""

    number: int
    color: str
    shape: str
    x: float
    y: float
    half: float

    @property
    def name(self) -> str:
        """What a question calls it, "red circle"."""
        return f"{self.color} {self.shape}"


def _dice(name: str) -> random.Random:
    """Random choices that a name alone decides."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _shuffled(items: Sequence, dice: random.Random) -> list:
    """The items in random order."""
    return sorted(items, key=lambda _: dice.random())


def draw(image_id: str) -> Image.Image:
    """Draws one scene, 64x64 RGB."""
    things, dice = _scene(image_id)
    shade = dice.uniform(105, 155)
    ground = tuple(int(shade + dice.uniform(-12, 12)) for _ in range(3))
    canvas = Image.new("RGB", (SIZE * FINE, SIZE * FINE), ground)
    pen = ImageDraw.Draw(canvas)
    for thing in things:
        color = tuple(int(c + dice.uniform(-10, 10)) for c in COLORS[thing.color])
        _draw_thing(pen, thing, color, ground)
    return canvas.reduce(FINE)


def questions(split: str, scenes: int, first: int = 0) -> dict[str, dict]:
    """Questions about scenes `first` to `first + scenes - 1` of a split, about ten each, by id."""
    found = {}
    for index in range(first, first + scenes):
        image_id = f"{split}-{index:06d}"
        for number, draft in enumerate(_ask(image_id)):
            question_id = f"{image_id}-{number:02d}"
            found[question_id] = _entry(draft, image_id, question_id)
    return found


def _scene(image_id: str) -> tuple[list[Thing], random.Random]:
    """The objects of an image, and its dice, ready for the choices that only drawing needs."""
    split = image_id.rpartition("-")[0]
    if split not in SPLIT_SHARES:
        raise ValueError(f"{image_id!r} is not of a known split ({', '.join(SPLIT_SHARES)})")
    dice = _dice(image_id)
    while True:
        looks = _inventory(dice)
        if _dice(str(sorted(looks))).choice(range(10)) in SPLIT_SHARES[split]:
            break
    while not (places := _layout(dice, len(looks))):
        pass
    return [Thing(i, *looks[i], *places[i]) for i in range(len(looks))], dice


def _inventory(dice: random.Random) -> list[tuple[str, str]]:
    """The (colour, shape) of 3 to 6 objects, one colour and one shape often repeated."""
    count = dice.choice((3, 4, 5, 6))
    columns = []
    for names in (list(COLORS), list(SHAPES)):
        main, *others = _shuffled(names, dice)
        repeats = dice.choice(range(1, min(4, count - 1) + 1))
        column = [main] * repeats + [dice.choice(others) for _ in range(count - repeats)]
        columns.append(_shuffled(column, dice))
    return list(zip(*columns, strict=True))


def _layout(dice: random.Random, count: int) -> list[tuple[float, float, float]] | None:
    """Centres and half heights of objects that keep 2 pixels apart, or None if they do not fit."""
    places: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(20):
            half = dice.uniform(5.5, 8.0)
            x, y = (dice.uniform(half + 1, SIZE - half - 1) for _ in range(2))
            if all(max(abs(x - u), abs(y - v)) > half + h + 2 for u, v, h in places):
                places.append((x, y, half))
                break
        else:
            return None
    return places


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, color: tuple, ground: tuple) -> None:
    """Draws one object on the enlarged canvas."""

    def scaled(*points: tuple[float, float]) -> list[tuple[int, int]]:
        def fine(at: float, offset: float) -> int:
            return round((at + offset * thing.half) * FINE)

        return [(fine(thing.x, x), fine(thing.y, y)) for x, y in points]

    if thing.shape in ("circle", "ring"):
        pen.ellipse(scaled((-1, -1), (1, 1)), fill=color)
        if thing.shape == "ring":
            pen.ellipse(scaled((-0.52, -0.52), (0.52, 0.52)), fill=ground)
    elif thing.shape == "square":
        pen.rectangle(scaled((-0.88, -0.88), (0.88, 0.88)), fill=color)
    elif thing.shape == "cross":
        pen.rectangle(scaled((-1, -0.32), (1, 0.32)), fill=color)
        pen.rectangle(scaled((-0.32, -1), (0.32, 1)), fill=color)
    elif thing.shape == "triangle":
        pen.polygon(scaled((0, -1), (1, 0.88), (-1, 0.88)), fill=color)
    else:
        pen.polygon(scaled((0, -1), (1, 0), (0, 1), (-1, 0)), fill=color)


def _ask(image_id: str) -> list[Draft]:
    """The questions of one scene, no two with the same words."""
    things, _ = _scene(image_id)
    dice = _dice(f"questions {image_id}")
    drafts: dict[str, Draft] = {}
    for kind, count in KINDS:
        for draft in _shuffled(kind(things, dice), dice)[:count]:
            drafts.setdefault(draft[1], draft)
    return list(drafts.values())


def _alone(things: list[Thing], attribute: str) -> list[Thing]:
    """The objects whose attribute no other object of the scene shares."""
    times = Counter(getattr(thing, attribute) for thing in things)
    return [thing for thing in things if times[getattr(thing, attribute)] == 1]


def _offset(thing: Thing, other: Thing, side: str) -> float:
    """How far, in pixels, a thing lies to that side of another."""
    _, axis, sign, _ = RELATIONS[side]
    return sign * (getattr(thing, axis) - getattr(other, axis))


def _query(things: list[Thing], dice: random.Random, asked: str) -> list[Draft]:
    """What color is the circle? What shape is the red object?"""
    drafts: list[Draft] = []
    for thing in _alone(things, "shape" if asked == "color" else "color"):
        name = thing.shape if asked == "color" else f"{thing.color} object"
        answer, article = getattr(thing, asked), "a " if asked == "shape" else ""
        steps = [("select", [], f"{name} ({thing.number})"), ("query", [0], asked)]
        words = (f"What {asked} is the {name}?", answer, f"The {name} is {article}{answer}.")
        drafts.append((f"query attr {asked}Query", *words, steps))
    return drafts


def _count(things: list[Thing], dice: random.Random, by: str) -> list[Draft]:
    """How many circles are there? How many red objects are there?"""
    names = list(COLORS if by == "color" else SHAPES)
    times = [sum(getattr(thing, by) == name for thing in things) for name in names]
    name = dice.choices(names, [COUNT_WEIGHTS[n] / times.count(n) for n in times])[0]
    plural = name + ("es" if name == "cross" else "s")
    counted = plural if by == "shape" else f"{name} objects"
    numbers = ",".join(str(t.number) for t in things if getattr(t, by) == name) or "-"
    answer = NUMBERS[times[names.index(name)]]
    words = (f"How many {counted} are there?", answer, f"The number of {counted} is {answer}.")
    steps = [("select", [], f"{counted} ({numbers})"), ("count", [0], "")]
    return [(f"query obj {by}Count", *words, steps)]


def _related(things: list[Thing], dice: random.Random, asked: str) -> list[Draft]:
    """What color is the object to the left of the red circle? Asked where just one object is."""
    drafts = []
    for other in _alone(things, "name"):
        for side, (phrase, *_) in RELATIONS.items():
            beyond = [thing for thing in things if _offset(thing, other, side) > 0]
            if len(beyond) != 1 or _offset(beyond[0], other, side) < CLEAR:
                continue
            place = f"object {phrase} the {other.name}"
            answer, article = getattr(beyond[0], asked), "a " if asked == "shape" else ""
            relate = ("relate", [0], f"object,{phrase},s ({beyond[0].number})")
            words = (f"What {asked} is the {place}?", answer, f"The {place} is {article}{answer}.")
            find: Step = ("select", [], f"{other.name} ({other.number})")
            drafts.append(
                (f"query rel {asked}Related", *words, [find, relate, ("query", [1], asked)])
            )
    return drafts


def _pairs(things: list[Thing]) -> list[tuple[Thing, Thing, str]]:
    """Every (thing, other, side) with the thing clearly on that side, and only one of each name."""
    named = _alone(things, "name")
    sides = [(a, b, side) for a in named for b in named for side in RELATIONS]
    return [(a, b, side) for a, b, side in sides if _offset(a, b, side) >= CLEAR]


def _compare(things: list[Thing], dice: random.Random, verify: bool) -> list[Draft]:
    """Is the red circle above or below the blue square? Is the red circle above the blue square?"""
    drafts = []
    for thing, other, side in _pairs(things):
        phrase, axis, _, opposite = RELATIONS[side]
        kind, answer, false = "choose", side, RELATIONS[opposite][0]
        said = "to the left or to the right of" if axis == "x" else "above or below"
        if verify:
            kind, answer = "verify", dice.choice(("yes", "no"))
            said = phrase if answer == "yes" else false
        argument = f"{thing.name},{said if verify else f'{phrase}|{false}'},s ({thing.number})"
        find: Step = ("select", [], f"{other.name} ({other.number})")
        words = (f"Is the {thing.name} {said} the {other.name}?", answer)
        full_answer = f"The {thing.name} is {phrase} the {other.name}."
        steps = [find, (f"{kind} rel", [0], argument)]
        drafts.append((f"{kind} rel {kind}Relation", *words, full_answer, steps))
    return drafts


def _exist(things: list[Thing], dice: random.Random) -> list[Draft]:
    """Is there a green cross? Where there is none, the scene has something green and a cross."""
    seen = {thing.name: str(thing.number) for thing in things}
    mixed = {f"{a.color} {b.shape}": "-" for a in things for b in things if a is not b}
    wanted = dice.choice((seen, {name: n for name, n in mixed.items() if name not in seen} or seen))
    name = dice.choice(list(wanted))
    noun = f"an {name}" if name[0] == "o" else f"a {name}"
    words = ("yes", f"There is {noun}.") if name in seen else ("no", f"There is no {name}.")
    steps = [("select", [], f"{name} ({wanted[name]})"), ("exist", [0], "?")]
    return [("verify obj exist", f"Is there {noun}?", *words, steps)]


def _entry(draft: Draft, image_id: str, question_id: str) -> dict[str, Any]:
    """A question as GQA's files write it."""
    types, question, answer, full_answer, steps = draft
    structural, semantic, detailed = types.split()
    program = [f"{o}: {a}" + "".join(f" [{d}]" for d in needs) for o, needs, a in steps]
    return {
        "imageId": image_id,
        "question": question,
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
        "semantic": [{"operation": o, "dependencies": d, "argument": a} for o, d, a in steps],
        "semanticStr": "->".join(program),
        "groups": {"global": None, "local": f"{detailed}-{steps[0][2]}"},
        "fullAnswer": full_answer,
        "entailed": [],
        "equivalent": [question_id],
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
    }


KINDS = (  # what is asked of every scene, and how many of each at most
    (partial(_query, asked="color"), 2),
    (partial(_query, asked="shape"), 2),
    (partial(_count, by="shape"), 1),
    (partial(_count, by="color"), 1),
    (partial(_related, asked="color"), 1),
    (partial(_related, asked="shape"), 1),
    (partial(_compare, verify=False), 1),
    (lambda things, dice: dice.choice((partial(_compare, verify=True), _exist))(things, dice), 1),
)
