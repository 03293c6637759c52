"""Synthetic scenes: reproducible, with correct answers, disjoint splits and no text-only bias."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from itertools import chain

import pytest

from nemo_vlm_ptq.data import scene_questions, scenes
from nemo_vlm_ptq.data.questions import load_questions

# sha256. Images also depend on how Pillow rasterizes; 11.3, 12.0 and 13.0 agree.
IMAGES_HASH = "1eb932778dc3a538928fb8089e3cab9c5f2779ee837882100291f22c426855b3"
QUESTIONS_HASH = "30d1908b82d54de14af8422942d0fba9dc2bbfa804dfe0f388e7088889a97386"
TEST_SCENES = 250
# A point inside each shape, relative to its centre in units of half_size; else the centre.
INTERIOR_POINT = {"ring": (0.76, 0.0)}
SIDES = {
    "to the left of": lambda a, b: a.x < b.x,
    "to the right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}
PHRASES_OF_AXIS = {"x": ("to the left of", "to the right of"), "y": ("above", "below")}
SIDE_PATTERN = "|".join(SIDES)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="module")
def entries():
    """Test questions by id."""
    return scene_questions.questions("test", TEST_SCENES)


def objects_of(image_id):
    return scenes.generate_scene(image_id)[0]


def find_object(objects, name):
    """Return the only object of a name: 'ring', 'red object' or 'red ring'."""
    found = [
        item
        for item in objects
        if all(word in (item.color, item.shape, "object") for word in name.split())
    ]
    assert len(found) == 1, (name, found)
    return found[0]


def singular(plural):
    return "cross" if plural == "crosses" else plural.removesuffix("s")


def solve(question, objects):
    """Derive the answer from the text of the question and the objects."""
    if match := re.fullmatch(rf"What (\w+) is the object ({SIDE_PATTERN}) the (.+)\?", question):
        attribute, side, other = match.groups()
        other = find_object(objects, other)
        (found,) = [item for item in objects if SIDES[side](item, other)]
        return getattr(found, attribute)
    if match := re.fullmatch(r"What (\w+) is the (.+)\?", question):
        return getattr(find_object(objects, match[2]), match[1])
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        *color, noun = match[1].split()
        attributes = {*color, singular(noun)} - {"object"}
        return NUMBERS[sum(attributes <= {item.color, item.shape} for item in objects)]
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        exists = any((item.color, item.shape) == match.groups() for item in objects)
        return "yes" if exists else "no"
    return solve_comparison(question, objects)


def solve_comparison(question, objects):
    """Derive the side, or whether it is that side; both objects must be clearly apart."""
    pattern = r"Is the (\w+ \w+) (.+) the (\w+ \w+)\?"
    name, phrase, other_name = re.fullmatch(pattern, question).groups()
    item, other = find_object(objects, name), find_object(objects, other_name)
    axis = "y" if "above" in phrase or "below" in phrase else "x"
    assert abs(getattr(item, axis) - getattr(other, axis)) >= scene_questions.MIN_OFFSET
    if phrase in SIDES:
        return "yes" if SIDES[phrase](item, other) else "no"
    (side,) = [side for side in PHRASES_OF_AXIS[axis] if SIDES[side](item, other)]
    return side.removeprefix("to the ").removesuffix(" of")


def test_every_answer_follows_from_the_scene(entries):
    wrong = [
        (name, entry["question"], entry["answer"])
        for name, entry in entries.items()
        if solve(entry["question"], objects_of(entry["imageId"])) != entry["answer"]
    ]
    assert not wrong


def test_images_show_the_objects_of_the_scene():
    for index in range(60):
        image_id = f"test-{index:06d}"
        image = scenes.draw(image_id)
        assert (image.size, image.mode) == ((64, 64), "RGB")
        for item in objects_of(image_id):
            right, down = INTERIOR_POINT.get(item.shape, (0.0, 0.0))
            point = int(item.x + right * item.half_size), int(item.y + down * item.half_size)
            pixel = image.getpixel(point)
            distances = {name: math.dist(color, pixel) for name, color in scenes.COLORS.items()}
            assert min(distances, key=distances.get) == item.color, (image_id, item, pixel)


def test_images_and_questions_are_reproducible():
    images = hashlib.sha256()
    for image_id in ("test-000000", "calibration-000007", "train-123456"):
        images.update(scenes.draw(image_id).tobytes())
    questions = [scene_questions.questions(split, 20) for split in ("test", "calibration")]
    assert images.hexdigest() == IMAGES_HASH
    assert hashlib.sha256(json.dumps(questions).encode()).hexdigest() == QUESTIONS_HASH


def test_questions_do_not_depend_on_the_requested_range():
    together = scene_questions.questions("train", 9)
    parts = [scene_questions.questions("train", 3, first=start) for start in (6, 0, 3)]
    assert dict(chain.from_iterable(part.items() for part in parts)) == together


def test_splits_share_no_inventory():
    inventories = {
        split: {
            tuple(sorted(item.name for item in objects_of(f"{split}-{index:06d}")))
            for index in range(TEST_SCENES)
        }
        for split in scenes.SPLIT_SHARES
    }
    assert set(inventories) == {"test", "calibration", "train"}
    counts = Counter(chain.from_iterable(inventories.values()))
    assert max(counts.values()) == 1


def test_an_unknown_split_is_rejected():
    with pytest.raises(ValueError, match=r"must start with a split .*, got 'dev-000001'"):
        scenes.draw("dev-000001")


def test_test_questions_have_the_fields_of_gqa(entries):
    assert len(entries) >= 2000
    assert len({entry["imageId"] for entry in entries.values()}) == TEST_SCENES
    keys = {
        "imageId", "question", "answer", "isBalanced", "types", "semantic", "semanticStr",
        "groups", "fullAnswer", "entailed", "equivalent", "annotations",
    }  # fmt: skip
    answers = {*scenes.COLORS, *scenes.SHAPES, *NUMBERS, "yes", "no"}
    answers |= {"left", "right", "above", "below"}
    for name, entry in entries.items():
        assert set(entry) == keys
        assert set(entry["types"]) == {"structural", "semantic", "detailed"}
        assert set(entry["groups"]) == {"global", "local"}
        assert entry["isBalanced"] is True and entry["equivalent"] == [name]
        assert entry["answer"] in answers
        for step in entry["semantic"]:
            assert set(step) == {"operation", "dependencies", "argument"}


def test_no_scene_has_a_question_twice(entries):
    counts = Counter((entry["imageId"], entry["question"]) for entry in entries.values())
    assert max(counts.values()) == 1


def test_full_answers_hold_the_answer(entries):
    for entry in entries.values():
        if entry["answer"] not in ("yes", "no"):
            assert f" {entry['answer']}" in entry["fullAnswer"]


def test_accuracy_from_text_alone_is_below_45_percent(entries):
    by_text, by_type = defaultdict(Counter), defaultdict(Counter)
    for entry in scene_questions.questions("train", 1000).values():
        by_text[entry["question"]][entry["answer"]] += 1
        by_type[entry["types"]["detailed"]][entry["answer"]] += 1
    correct = 0
    for entry in entries.values():
        answers = by_text.get(entry["question"]) or by_type[entry["types"]["detailed"]]
        correct += answers.most_common(1)[0][0] == entry["answer"]
    assert 10 < 100 * correct / len(entries) < 45


def test_calibration_questions_are_sampled_with_the_seed():
    for count in (1, 512, 3000):
        assert len(load_questions("scenes", "calibration", count).items) == count
    first, same, other = (
        [item.id for item in load_questions("scenes", "calibration", 64, seed=seed).items]
        for seed in (0, 0, 1)
    )
    assert first == same != other
    assert all(name.startswith("calibration-") for name in first + other)
