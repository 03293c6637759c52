"""Questions about the hard level of the synthetic scenes, in the file format of GQA.

The image of a question about two images is a list of two ids: the scene's and the next one's.
Objects are referred to by attributes that no other object of the scene has together.
"""

import math
import random
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

from nemo_vlm_ptq.data.hard_drafts import (
    ATTRIBUTES,
    KEYS,
    NUMBERS,
    Scene,
    balanced,
    countable,
    describe,
    make_draft,
    name_of,
    noun_of,
    values_of,
)
from nemo_vlm_ptq.data.hard_scenes import PREFIX, TOUCHING, HardObject, generate_scene
from nemo_vlm_ptq.data.scene_questions import Draft, gqa_entry
from nemo_vlm_ptq.data.scenes import seeded_random, shuffled

MIN_RATIO = 1.15  # of half sizes that are compared
NEAREST_RATIO = 1.2  # the second nearest object is farther by this factor
MIN_OFFSET = 10.0  # pixels between centres of objects whose sides are asked for
SOLID = ("circle", "square", "diamond")  # shapes that surely overlap at TOUCHING
SIDES = {  # answer -> opposite answer, axis, sign, words
    "left": ("right", "x", -1, "to the left or to the right of"),
    "right": ("left", "x", 1, "to the left or to the right of"),
    "above": ("below", "y", -1, "above or below"),
    "below": ("above", "y", 1, "above or below"),
}


def questions(split: str, scenes: int, first: int = 0) -> dict[str, dict]:
    """Return questions about scenes `first` to `first + scenes - 1` of a split, by question id.

    A scene has about 13 questions, two or three of which are about it and the next scene.
    """
    entries = {}
    for index in range(first, first + scenes):
        ids = [f"{PREFIX}{split}-{i:06d}" for i in (index, index + 1)]
        single, paired = draft_questions(*ids)
        for number, draft in enumerate(single + paired):
            images: Any = ids if number >= len(single) else ids[0]
            question_id = f"{ids[0]}-{number:02d}"
            entries[question_id] = gqa_entry(draft, images, question_id)
    return entries


def draft_questions(image_id: str, next_id: str) -> tuple[list[Draft], list[Draft]]:
    """Draft the questions of one scene, and those of it and the next, without duplicates."""
    scene, other = (describe(generate_scene(name)[0]) for name in (image_id, next_id))
    rng = seeded_random(f"questions {image_id}")
    single: dict[str, Draft] = {}
    for generate, count in SINGLE_TYPES:
        for draft in shuffled(generate(scene, rng), rng)[:count]:
            single.setdefault(draft.question, draft)
    paired: dict[str, Draft] = {}
    for compare in PAIRED_TYPES:
        for draft in compare(scene, other, rng):
            paired.setdefault(draft.question, draft)
    return list(single.values()), list(paired.values())


def _query(scene: Scene, rng: random.Random, attribute: str) -> list[Draft]:
    """Draft "What color is the large circle?"."""
    drafts = []
    for item in scene.objects:
        name = name_of(scene, item, rng, hidden=attribute)
        if name:
            text = f"What {attribute} is the {name}?"
            answer = getattr(item, attribute)
            drafts.append(make_draft(f"query attr {attribute}Query", text, answer, name))
    return drafts


def _count(scene: Scene, rng: random.Random, *keys: str) -> list[Draft]:
    """Draft "How many large circles are there?"."""
    options = countable((scene,), keys)
    if not options:
        return []
    values = balanced(options, rng)
    counted, kind = noun_of(values, plural=True), "".join(key.title() for key in keys)
    text = f"How many {counted} are there?"
    return [make_draft(f"query obj count{kind}", text, NUMBERS[options[values]], counted)]


def _compare_numbers(scene: Scene, rng: random.Random) -> list[Draft]:
    """Draft "Are there more circles or more squares?"; the answer is one of the two."""
    key = rng.choice(("color", "shape"))
    options = countable((scene,), (key,))
    pairs = [(a, b) for a in options for b in options if options[a] > options[b] > 0]
    if not pairs:
        return []
    more, fewer = rng.choice(pairs)
    first, second = (noun_of(v, plural=True) for v in shuffled([more, fewer], rng))
    text = f"Are there more {first} or more {second}?"
    return [make_draft("choose obj moreObjects", text, more[0][1], first, second)]


def _compare_sizes(scene: Scene, rng: random.Random) -> list[Draft]:
    """Draft "Is the red circle larger or smaller than the blue square?"."""
    drafts = []
    for item, other in _some_pairs(scene, rng):
        ratio = item.half_size / other.half_size
        names = name_of(scene, item, rng, "size"), name_of(scene, other, rng, "size")
        if max(ratio, 1 / ratio) < MIN_RATIO or None in names:
            continue
        text = f"Is the {names[0]} larger or smaller than the {names[1]}?"
        answer = "larger" if ratio > 1 else "smaller"
        drafts.append(make_draft("choose attr sizeRelation", text, answer, *map(str, names)))
    return drafts


def _some_pairs(scene: Scene, rng: random.Random) -> list[tuple[HardObject, HardObject]]:
    """Return a few pairs of different objects."""
    pairs = [rng.sample(scene.objects, 2) for _ in range(6)]
    return [(first, second) for first, second in pairs]


def _side(scene: Scene, rng: random.Random) -> list[Draft]:
    """Draft "Is the red circle above or below the blue square?"."""
    drafts = []
    for item, other in _some_pairs(scene, rng):
        names = name_of(scene, item, rng), name_of(scene, other, rng)
        side = rng.choice(list(SIDES))
        _, axis, sign, words = SIDES[side]
        offset = sign * (getattr(item, axis) - getattr(other, axis))
        if abs(offset) < MIN_OFFSET or None in names:
            continue
        answer = side if offset > 0 else SIDES[side][0]
        text = f"Is the {names[0]} {words} the {names[1]}?"
        drafts.append(make_draft("choose rel chooseRelation", text, answer, *map(str, names)))
    return drafts


def _nearest(scene: Scene, rng: random.Random, attribute: str) -> list[Draft]:
    """Draft "What color is the object nearest to the red circle?"."""
    drafts = []
    for item in scene.objects:
        name = name_of(scene, item, rng)
        others = sorted(
            (math.hypot(item.x - other.x, item.y - other.y), other.index)
            for other in scene.objects
            if other is not item
        )
        if name and others[1][0] > NEAREST_RATIO * others[0][0]:
            text = f"What {attribute} is the object nearest to the {name}?"
            answer = getattr(scene.objects[others[0][1]], attribute)
            drafts.append(make_draft(f"query rel {attribute}Nearest", text, answer, name))
    return drafts


def _front(scene: Scene, rng: random.Random) -> list[Draft]:
    """Draft "Is the red circle in front of or behind the blue square?"."""
    drafts = []
    for item, other in combinations(scene.objects, 2):
        gap = math.hypot(item.x - other.x, item.y - other.y)
        solid = item.shape in SOLID and other.shape in SOLID and item.color != other.color
        if not solid or gap > TOUCHING * (item.half_size + other.half_size):
            continue
        front, (first, second) = other, shuffled([item, other], rng)
        names = name_of(scene, first, rng), name_of(scene, second, rng)
        if None not in names:
            text = f"Is the {names[0]} in front of or behind the {names[1]}?"
            answer = "front" if first is front else "behind"
            drafts.append(make_draft("choose rel occlusion", text, answer, *map(str, names)))
    return drafts


def _read(scene: Scene, rng: random.Random) -> list[Draft]:
    """Draft "What is written on the red sign?"."""
    return [
        make_draft("query text readText", f"What is written on the {sign.color} sign?", sign.word,
               f"{sign.color} sign")
        for sign in scene.scene.signs
    ]  # fmt: skip


def _exist(scene: Scene, rng: random.Random) -> list[Draft]:
    """Draft "Is there a small red circle?"; if there is none, each attribute is in the scene."""
    values = values_of(rng.choice(scene.objects), ATTRIBUTES)
    if rng.random() < 0.5:
        mixed = [
            tuple((key, getattr(rng.choice(scene.objects), key)) for key in ATTRIBUTES)
            for _ in range(10)
        ]
        values = next((one for one in mixed if not scene.counts[one]), values)
    answer, noun = "yes" if scene.counts[values] else "no", noun_of(values)
    return [make_draft("verify obj exist", f"Is there a {noun}?", answer, noun)]


def _which_has_more(scene: Scene, other: Scene, rng: random.Random) -> list[Draft]:
    """Draft "Which image has more circles, the first or the second?"."""
    options = countable((scene,), (rng.choice(("color", "shape")),))
    differing = [v for v in options if scene.counts[v] != other.counts[v]]
    if not differing:
        return []
    values = rng.choice(differing)
    noun = noun_of(values, plural=True)
    answer = "first" if scene.counts[values] > other.counts[values] else "second"
    text = f"Which image has more {noun}, the first or the second?"
    return [make_draft("choose obj pairMore", text, answer, noun)]


def _in_both(scene: Scene, other: Scene, rng: random.Random) -> list[Draft]:
    """Draft "How many red objects are there in both images together?"."""
    options = countable((scene, other), (rng.choice(("color", "shape")),))
    values = balanced(options, rng)
    noun = noun_of(values, plural=True)
    text = f"How many {noun} are there in both images together?"
    return [make_draft("query obj pairCount", text, NUMBERS[options[values]], noun)]


def _which_has(scene: Scene, other: Scene, rng: random.Random) -> list[Draft]:
    """Draft "Which image has a large red circle, the first or the second?"."""
    answer, (shown, hidden) = rng.choice((("first", (scene, other)), ("second", (other, scene))))
    keys = rng.choice([keys for keys in KEYS if len(keys) > 1])
    found = [v for item in shown.objects if not hidden.counts[v := values_of(item, keys)]]
    if not found:
        return []
    noun = noun_of(rng.choice(found))
    text = f"Which image has a {noun}, the first or the second?"
    return [make_draft("choose obj pairExist", text, answer, noun)]


Generate = Callable[[Scene, random.Random], list[Draft]]
SINGLE_TYPES: tuple[tuple[Generate, int], ...] = (  # with the largest number for each scene
    (partial(_query, attribute="color"), 1),
    (partial(_query, attribute="shape"), 1),
    (lambda scene, rng: _count(scene, rng, rng.choice(("color", "shape"))), 1),
    (lambda scene, rng: _count(scene, rng, "color", "shape"), 1),
    (lambda scene, rng: _count(scene, rng, "size", rng.choice(("color", "shape"))), 1),
    (_compare_numbers, 1),
    (_compare_sizes, 1),
    (_side, 1),
    (lambda scene, rng: _nearest(scene, rng, rng.choice(("color", "shape"))), 1),
    (_front, 1),
    (_read, 1),
    (_exist, 1),
)
PAIRED_TYPES = (_which_has_more, _in_both, _which_has)
