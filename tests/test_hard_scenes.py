"""The hard level of drawn scenes: reproducible, right answers, disjoint splits, needs images."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict

import pytest

from nemo_vlm_ptq.data import glyphs, hard_questions, hard_scenes, scenes
from nemo_vlm_ptq.data.questions import load_questions

# sha256. Images also depend on how Pillow rasterizes.
IMAGES_HASH = "2a099f58fcf95234c9377fb9006219fbe86fc25cfb8b18a9d42dcc7929876017"
QUESTIONS_HASH = "68cde2fe59e87dfcbea6198250bc7a07fbe9c8880e5ea28e60f4980225bf549b"
TEST_SCENES = 100
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIDES = {
    "above or below": lambda a, b: "above" if a.y < b.y else "below",
    "to the left or to the right of": lambda a, b: "left" if a.x < b.x else "right",
    "in front of or behind": lambda a, b: "front" if a.index > b.index else "behind",
}
# A point inside each shape, relative to its centre in units of half_size; else the centre.
INTERIOR_POINT = {"ring": (0.75, 0.0)}


@pytest.fixture(scope="module")
def entries():
    """Test questions by id."""
    return hard_questions.questions("test", TEST_SCENES)


def scenes_of(entry):
    """Return the scenes of a question's images."""
    ids = entry["imageId"] if isinstance(entry["imageId"], list) else [entry["imageId"]]
    return [hard_scenes.generate_scene(name)[0] for name in ids]


def fitting(scene, noun):
    """Return the objects that a noun, of one or of several, fits."""
    known = {*hard_scenes.HALF_SIZES, *scenes.COLORS, *hard_scenes.SHAPES, "object"}
    words = {next(one for one in known if re.fullmatch(f"{one}(e?s)?", w)) for w in noun.split()}
    words -= {"object"}
    return [item for item in scene.objects if words <= {item.size, item.color, item.shape}]


def only(scene, noun):
    (found,) = fitting(scene, noun)
    return found


def solve_two(text, first, second):
    """Derive the answer to a question about two images."""
    if match := re.fullmatch(r"How many (.+) are there in both images together\?", text):
        return NUMBERS[sum(len(fitting(scene, match[1])) for scene in (first, second))]
    match = re.fullmatch(r"Which image has (more|a) (.+), the first or the second\?", text)
    counts = [len(fitting(scene, match[2])) for scene in (first, second)]
    assert counts[0] != counts[1] and (match[1] == "more" or 0 in counts)
    return "first" if counts[0] > counts[1] else "second"


def solve(text, scene):
    """Derive the answer from the text of a question about one image and its scene."""
    if match := re.fullmatch(r"What (\w+) is the object nearest to the (.+)\?", text):
        item = only(scene, match[2])
        others = [other for other in scene.objects if other is not item]
        nearest = min(others, key=lambda other: math.dist((item.x, item.y), (other.x, other.y)))
        return getattr(nearest, match[1])
    if match := re.fullmatch(r"What is written on the (\w+) sign\?", text):
        (sign,) = [sign for sign in scene.signs if sign.color == match[1]]
        return sign.word
    if match := re.fullmatch(r"What (\w+) is the (.+)\?", text):
        return getattr(only(scene, match[2]), match[1])
    if match := re.fullmatch(r"How many (.+) are there\?", text):
        return NUMBERS[len(fitting(scene, match[1]))]
    if match := re.fullmatch(r"Is there a (.+)\?", text):
        return "yes" if fitting(scene, match[1]) else "no"
    return solve_comparison(text, scene)


def solve_comparison(text, scene):
    """Derive the answer to a question about two objects, or two kinds of objects."""
    if match := re.fullmatch(r"Are there more (.+) or more (.+)\?", text):
        most = max(match.groups(), key=lambda noun: len(fitting(scene, noun)))
        word = most.removesuffix(" objects")
        return word if word in scenes.COLORS else fitting(scene, most)[0].shape
    if match := re.fullmatch(r"Is the (.+) larger or smaller than the (.+)\?", text):
        first, second = (only(scene, noun) for noun in match.groups())
        return "larger" if first.half_size > second.half_size else "smaller"
    noun, side, other = re.fullmatch(f"Is the (.+) ({'|'.join(SIDES)}) the (.+)\\?", text).groups()
    return SIDES[side](only(scene, noun), only(scene, other))


def test_every_answer_follows_from_the_scenes(entries):
    wrong = []
    for name, entry in entries.items():
        shown = scenes_of(entry)
        answer = (solve if len(shown) == 1 else solve_two)(entry["question"], *shown)
        if answer != entry["answer"]:
            wrong.append((name, entry["question"], entry["answer"], answer))
    assert not wrong


def name_of(pixel):
    return min(scenes.COLORS, key=lambda name: math.dist(scenes.COLORS[name], pixel))


def test_images_show_the_objects_of_the_scene():
    seen = 0
    for index in range(60):
        image_id = f"hard-test-{index:06d}"
        image = hard_scenes.draw(image_id)
        assert (image.size, image.mode) == ((128, 128), "RGB")
        objects = hard_scenes.generate_scene(image_id)[0].objects
        for item in objects:
            right, down = INTERIOR_POINT.get(item.shape, (0.0, 0.0))
            point = item.x + right * item.half_size, item.y + down * item.half_size
            nearer = [other for other in objects if other.index > item.index]
            if any(math.dist(point, (o.x, o.y)) < 1.5 * o.half_size for o in nearer):
                continue
            x, y = (int(value) for value in point)
            width = 1 if item.shape == "ring" else 0  # a small one is a pixel wide inside its edges
            near = image.crop((x - width, y - width, x + width + 1, y + width + 1))
            colors = {name_of(pixel) for _, pixel in near.getcolors()}
            assert item.color in colors, (image_id, item, colors)
            seen += 1
    assert seen > 200


def test_what_lies_in_front_covers_what_lies_behind(entries):
    asked = [one for one in entries.values() if one["types"]["detailed"] == "occlusion"]
    assert len(asked) > 10
    assert {one["answer"] for one in asked} == {"front", "behind"}
    for entry in asked:
        (scene,) = scenes_of(entry)
        names = re.fullmatch(r"Is the (.+) in front of or behind the (.+)\?", entry["question"])
        first, second = (only(scene, noun) for noun in names.groups())
        gap = math.dist((first.x, first.y), (second.x, second.y))
        assert gap < 0.7 * (first.half_size + second.half_size)


def test_letters_differ_from_each_other():
    assert len(set(glyphs.COLUMNS.values())) == 26
    assert all(len(bytes.fromhex(bits)) == glyphs.WIDTH for bits in glyphs.COLUMNS.values())


def test_images_and_questions_are_reproducible():
    images = hashlib.sha256()
    for image_id in ("hard-test-000000", "hard-calibration-000007", "hard-train-123456"):
        images.update(hard_scenes.draw(image_id).tobytes())
    made = [hard_questions.questions(split, 20) for split in ("test", "calibration")]
    assert images.hexdigest() == IMAGES_HASH
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest() == QUESTIONS_HASH


def test_questions_do_not_depend_on_the_requested_range():
    together = hard_questions.questions("train", 6)
    parts = [hard_questions.questions("train", 3, first=start) for start in (3, 0)]
    assert parts[0] | parts[1] == together


def test_splits_share_no_inventory():
    counts = Counter()
    for split in scenes.SPLIT_SHARES:
        found = set()
        for index in range(TEST_SCENES):
            scene, _ = hard_scenes.generate_scene(f"hard-{split}-{index:06d}")
            items = sorted((item.size, item.color, item.shape) for item in scene.objects)
            found.add((*items, *sorted((sign.color, sign.word) for sign in scene.signs)))
        counts.update(found)
    assert max(counts.values()) == 1


@pytest.mark.parametrize("name", ["hard-dev-000001", "test-000001", "hard-"])
def test_an_unknown_split_is_rejected(name):
    with pytest.raises(ValueError, match=f"must start with a split .*, got '{name}'"):
        hard_scenes.draw(name)


def test_accuracy_from_text_alone_is_below_45_percent(entries):
    by_text, by_type = defaultdict(Counter), defaultdict(Counter)
    for entry in hard_questions.questions("train", 600).values():
        by_text[entry["question"]][entry["answer"]] += 1
        by_type[entry["types"]["detailed"]][entry["answer"]] += 1
    correct = 0
    for entry in entries.values():
        answers = by_text.get(entry["question"]) or by_type[entry["types"]["detailed"]]
        correct += answers.most_common(1)[0][0] == entry["answer"]
    assert 10 < 100 * correct / len(entries) < 45


def test_recipes_name_the_level_hard_scenes():
    found = load_questions("hard_scenes", "calibration", 64)
    assert len(found.items) == 64 and found.folder is None
    assert all(item.id.startswith("hard-calibration-") for item in found.items)
    assert {image.size for image in found.load_images(found.items[0])} == {(128, 128)}
    assert found.identity() != load_questions("scenes", "calibration", 64).identity()
