"""Scenes: the same everywhere, true answers, splits apart, and not to be guessed blind."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from itertools import chain

import pytest

from nemo_vlm_ptq.data import scenes
from nemo_vlm_ptq.data.questions import load_questions

# sha256; pictures also depend on how Pillow fills a shape, the same in 11.3, 12.0 and 13.0.
PICTURES = "1eb932778dc3a538928fb8089e3cab9c5f2779ee837882100291f22c426855b3"
QUESTIONS = "30d1908b82d54de14af8422942d0fba9dc2bbfa804dfe0f388e7088889a97386"
TESTS = 250  # scenes that evaluation asks about
# A point of each shape that is surely coloured, in half heights from its centre.
INSIDE = {"ring": (0.76, 0.0)}
SIDES = {
    "to the left of": lambda a, b: a.x < b.x,
    "to the right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}
ACROSS = {"x": ("to the left of", "to the right of"), "y": ("above", "below")}
SIDE = "|".join(SIDES)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="module")
def asked():
    return scenes.questions("test", TESTS)


def things_of(image):
    return scenes._scene(image)[0]


def named(things, words):
    """The one thing that `words` describe: 'ring', 'red object' or 'red ring'."""
    found = [
        thing
        for thing in things
        if all(word in (thing.color, thing.shape, "object") for word in words.split())
    ]
    assert len(found) == 1, (words, found)
    return found[0]


def look(thing, asked):
    return {"color": thing.color, "shape": thing.shape}[asked]


def singular(plural):
    return "cross" if plural == "crosses" else plural.removesuffix("s")


def solve(question, things):
    """The answer, from the words of the question and the list of things alone."""
    if match := re.fullmatch(rf"What (\w+) is the object ({SIDE}) the (.+)\?", question):
        kind, side, other = match.groups()
        other = named(things, other)
        (found,) = [thing for thing in things if SIDES[side](thing, other)]
        return look(found, kind)
    if match := re.fullmatch(r"What (\w+) is the (.+)\?", question):
        return look(named(things, match[2]), match[1])
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        *color, noun = match[1].split()
        wanted = {*color, singular(noun)} - {"object"}
        return NUMBERS[sum(wanted <= {thing.color, thing.shape} for thing in things)]
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        seen = any((thing.color, thing.shape) == match.groups() for thing in things)
        return "yes" if seen else "no"
    return compare(question, things)


def compare(question, things):
    """Which side, or whether that side; both things are clearly apart on the axis asked about."""
    pair = r"Is the (\w+ \w+) (.+) the (\w+ \w+)\?"
    one, said, other = re.fullmatch(pair, question).groups()
    one, other = named(things, one), named(things, other)
    axis = "y" if "above" in said or "below" in said else "x"
    assert abs(getattr(one, axis) - getattr(other, axis)) >= scenes.CLEAR
    if said in SIDES:
        return "yes" if SIDES[said](one, other) else "no"
    (side,) = [side for side in SIDES if side in ACROSS[axis] and SIDES[side](one, other)]
    return side.removeprefix("to the ").removesuffix(" of")


def test_every_answer_follows_from_the_scene(asked):
    wrong = [
        (name, entry["question"], entry["answer"])
        for name, entry in asked.items()
        if solve(entry["question"], things_of(entry["imageId"])) != entry["answer"]
    ]
    assert not wrong


def test_what_a_scene_lists_is_what_is_drawn():
    for index in range(60):
        image_id = f"test-{index:06d}"
        picture = scenes.draw(image_id)
        assert (picture.size, picture.mode) == ((64, 64), "RGB")
        for thing in things_of(image_id):
            right, down = INSIDE.get(thing.shape, (0.0, 0.0))
            place = int(thing.x + right * thing.half), int(thing.y + down * thing.half)
            seen = picture.getpixel(place)
            away = {name: math.dist(color, seen) for name, color in scenes.COLORS.items()}
            assert min(away, key=away.get) == thing.color, (image_id, thing, seen)


def test_the_same_id_gives_the_same_picture_and_questions_everywhere():
    pictures = hashlib.sha256()
    for image_id in ("test-000000", "calibration-000007", "train-123456"):
        pictures.update(scenes.draw(image_id).tobytes())
    text = json.dumps([scenes.questions(split, 20) for split in ("test", "calibration")])
    assert pictures.hexdigest() == PICTURES
    assert hashlib.sha256(text.encode()).hexdigest() == QUESTIONS


def test_scenes_can_be_asked_for_in_any_portion():
    whole = scenes.questions("train", 9)
    parts = [scenes.questions("train", 3, first=start) for start in (6, 0, 3)]
    assert dict(chain.from_iterable(part.items() for part in parts)) == whole


def test_splits_share_no_inventory():
    inventories = {
        split: {
            tuple(sorted(thing.name for thing in things_of(f"{split}-{index:06d}")))
            for index in range(TESTS)
        }
        for split in scenes.SPLIT_SHARES
    }
    assert set(inventories) == {"test", "calibration", "train"}
    seen = Counter(chain.from_iterable(inventories.values()))
    assert max(seen.values()) == 1


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'dev-000001' is not of a known split"):
        scenes.draw("dev-000001")


def test_there_are_enough_test_questions_with_the_fields_of_gqa(asked):
    assert len(asked) >= 2000
    assert len({entry["imageId"] for entry in asked.values()}) == TESTS
    keys = {
        "imageId", "question", "answer", "isBalanced", "types", "semantic", "semanticStr",
        "groups", "fullAnswer", "entailed", "equivalent", "annotations",
    }  # fmt: skip
    words = {*scenes.COLORS, *scenes.SHAPES, *NUMBERS, "yes", "no"}
    words |= {"left", "right", "above", "below"}
    for name, entry in asked.items():
        assert set(entry) == keys
        assert set(entry["types"]) == {"structural", "semantic", "detailed"}
        assert set(entry["groups"]) == {"global", "local"}
        assert entry["isBalanced"] is True and entry["equivalent"] == [name]
        assert entry["answer"] in words
        for step in entry["semantic"]:
            assert set(step) == {"operation", "dependencies", "argument"}


def test_no_scene_is_asked_the_same_words_twice(asked):
    pairs = Counter((entry["imageId"], entry["question"]) for entry in asked.values())
    assert max(pairs.values()) == 1


def test_the_full_answer_holds_the_answer_or_is_the_truth_of_a_yes_or_no(asked):
    for entry in asked.values():
        if entry["answer"] not in ("yes", "no"):
            assert f" {entry['answer']}" in entry["fullAnswer"]


def test_who_cannot_see_guesses_less_than_45_percent(asked):
    by_text, by_kind = defaultdict(Counter), defaultdict(Counter)
    for entry in scenes.questions("train", 1000).values():
        by_text[entry["question"]][entry["answer"]] += 1
        by_kind[entry["types"]["detailed"]][entry["answer"]] += 1
    right = 0
    for entry in asked.values():
        known = by_text.get(entry["question"]) or by_kind[entry["types"]["detailed"]]
        right += known.most_common(1)[0][0] == entry["answer"]
    assert 10 < 100 * right / len(asked) < 45


def test_calibration_gets_as_many_questions_as_it_asks_for_drawn_by_seed():
    for count in (1, 512, 3000):
        assert len(load_questions("scenes", "calibration", count).items) == count
    first, same, other = (
        [item.id for item in load_questions("scenes", "calibration", 64, seed=seed).items]
        for seed in (0, 0, 1)
    )
    assert first == same != other
    assert all(name.startswith("calibration-") for name in first + other)
