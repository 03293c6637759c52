"""Evaluation: the counting rule, sight, paired comparison, and answers from a fake runtime."""

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import PIL.Image
import pytest
import torch

from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, Question, Questions
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.evaluate import answers as answer
from nemo_vlm_ptq.evaluate import comparison as compare
from nemo_vlm_ptq.evaluate import gqa, sight
from nemo_vlm_ptq.families.base import ImageInputs, Sample

IMAGES, TOKENS = 5, 3  # images of the fake data; image tokens of each


def make_questions(count=23):
    items = [
        Question(f"q{i:02d}", f"scene{i % IMAGES}", "w" * (i * 7 % 11 + 1), "yes", f"kind{i % 2}")
        for i in range(count)
    ]
    return Questions("fake", tuple(items), lambda name: PIL.Image.new("L", (2, 2), int(name[-1])))


@dataclass
class Fake:
    """Says what it sees and what it was asked, and counts what it had to do."""

    did: Counter = field(default_factory=Counter)
    lengths: list = field(default_factory=list)
    tokens: int = TOKENS

    def prepare(self, name, question, image):
        assert question.endswith(PROMPT_SUFFIX)
        if isinstance(image, PIL.Image.Image):
            self.did["processed"] += 1
            image = ImageInputs(torch.full((1, 3, 2, 2), float(image.getpixel((0, 0)))))
        else:
            assert image.pixel_values.is_meta  # values are not kept
        words = len(question) - len(PROMPT_SUFFIX)
        ids = torch.tensor([0] * TOKENS + [1] * words)
        return Sample(name, ids, ids == 0, image)

    def encode(self, pixels):
        self.did["encoded"] += len(pixels.pixel_values)
        return pixels.pixel_values[:, 0, 0, :1].expand(self.tokens, 4)

    def generate(self, samples, features, max_new_tokens):
        assert max_new_tokens >= 8
        self.lengths.append([len(sample.input_ids) for sample in samples])
        pairs = zip(samples, features, strict=True)
        return [[int(f[0, 0]), int(sample.input_ids.sum())] for sample, f in pairs]

    def model(self, seen=None):
        tell = "image {} words {}".format
        return answer.AnsweringModel(
            self, self.prepare, lambda ids: tell(*ids), {} if seen is None else seen
        )


@pytest.mark.parametrize(
    ("text", "right"),
    [("yes", True), (" Yes.\n", True), ("YES..", True), ("yes!", False), ("yes it is", False)],
)
def test_an_answer_counts_as_llava_counts_it(text, right):
    questions = make_questions(1)
    assert gqa.judge(questions, {"q00": text}) == {"q00": right}
    written = replace(questions, items=(replace(questions.items[0], answer="Yes."),))
    assert gqa.judge(written, {"q00": text}) == {"q00": right}  # a reference of somebody else's


def test_score_counts_by_kind_and_names_its_rule():
    questions = make_questions(10)
    answers = {item.id: "yes" if item.id < "q03" else "no" for item in questions.items}
    found = gqa.score(questions, answers)
    assert (found.rule, found.total, found.correct, found.accuracy) == ("llava", 10, 3, 30.0)
    assert found.by_kind == {"kind0": (2, 5), "kind1": (1, 5)}


def test_score_refuses_missing_answers_and_empty_data():
    with pytest.raises(UserError, match="2 of 3 questions of 'fake' have no answer, first 'q01'"):
        gqa.score(make_questions(3), {"q00": "yes"})
    with pytest.raises(UserError, match="no questions"):
        gqa.score(make_questions(0), {})


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (5, 9), (300, 1000)])
def test_wilson_interval_holds_the_shares_that_a_score_test_accepts(correct, total):
    shares = [i / 20000 for i in range(20001)]
    accepted = [
        100 * p
        for p in shares
        if abs(correct / total - p) <= 1.959964 * math.sqrt(p * (1 - p) / total)
    ]
    low, high = gqa.wilson(correct, total)
    assert low == pytest.approx(accepted[0], abs=0.006)
    assert high == pytest.approx(accepted[-1], abs=0.006)
    assert 0 <= low < high <= 100
    assert (low == 0) == (correct == 0) and (high == 100) == (correct == total)


def test_swap_shows_every_question_a_stranger_and_uses_each_image_once():
    items = make_questions().items
    swapped = sight.swap_images(items)
    assert all(swapped[item.id] != item.image for item in items)
    assert len({(item.image, swapped[item.id]) for item in items}) == IMAGES
    assert set(swapped.values()) == {item.image for item in items}
    assert sight.swap_images(random.Random(0).sample(items, len(items))) == swapped


def test_swap_refuses_a_single_image():
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        sight.swap_images([replace(item, image="one") for item in make_questions().items])


@pytest.mark.parametrize(
    ("normal", "swapped", "normal_16bit", "swapped_16bit", "word"),
    [
        (80, 40, 82, 40, "sees"),
        (80, 60, 82, 40, "no longer looks"),
        (61, 40, 82, 40, "sees"),
        (60.9, 40, 82, 40, "no longer looks"),
        (45, 40, None, None, "sees"),
        (44.9, 40, None, None, "no longer looks"),
        (44, 40, 80, None, "no longer looks"),
        (40, 40, 40, 41, "blind in 16 bit"),
        (40, 40, 40, 40, "blind in 16 bit"),
    ],
)
def test_a_model_sees_when_half_of_the_gap_is_left(
    normal, swapped, normal_16bit, swapped_16bit, word
):
    numbers = (normal, swapped, normal_16bit, swapped_16bit)
    assert sight.sees(*numbers) == (word == "sees")
    line = sight.verdict(*numbers)
    assert line.startswith(f"{word}: ") and "\n" not in line


def test_a_source_that_does_not_look_is_told_as_the_reason():
    reason = "16 bit: 0.0, it does not look either; ask questions that need the image"
    assert reason in sight.verdict(40, 40, 40, 40)
    assert reason not in sight.verdict(50, 40, 40, 40) and "either" not in sight.verdict(
        40, 40, 50, 40
    )


def test_answers_are_of_the_right_question_and_image():
    questions = make_questions()
    found = answer.answer_all(Fake().model(), questions, batch=4)
    assert list(found) == [item.id for item in questions.items]
    for item in questions.items:
        assert found[item.id] == f"image {item.image[-1]} words {len(item.text)}"


def test_answers_do_not_depend_on_order_or_batch():
    questions = make_questions()
    turned = replace(questions, items=questions.items[::-1])
    found = answer.answer_all(Fake().model(), questions, batch=4)
    assert answer.answer_all(Fake().model(), turned, batch=4) == found
    assert answer.answer_all(Fake().model(), questions, batch=1000) == found


def test_batches_hold_questions_of_like_length_and_progress_is_told():
    fake, told = Fake(), []
    answer.answer_all(
        fake.model(), make_questions(), batch=10, progress=lambda *now: told.append(now)
    )
    assert [len(part) for part in fake.lengths] == [10, 10, 3]
    lengths = list(itertools.chain(*fake.lengths))
    assert lengths == sorted(lengths)
    assert told == [(10, 23), (20, 23), (23, 23)]


def test_each_image_is_processed_and_encoded_once_over_runs_and_formats():
    questions, seen = make_questions(), {}
    drawn = Counter()

    def draw(name):
        drawn[name] += 1
        return make_questions().image(name)

    questions = replace(questions, image=draw)
    first, second = Fake(), Fake()
    answer.answer_all(first.model(seen), questions, batch=4)
    assert drawn == {f"scene{i}": 1 for i in range(IMAGES)}
    assert first.did == {"processed": IMAGES, "encoded": IMAGES}
    swapped = sight.swap_images(questions.items)
    found = answer.answer_all(second.model(seen), questions, swapped, batch=4)
    assert not second.did and drawn.total() == IMAGES
    assert all(text.startswith(f"image {swapped[name][-1]} ") for name, text in found.items())


def test_image_tokens_and_features_must_agree():
    with pytest.raises(UserError, match="room for 3 image tokens but image 'scene0' gives 4"):
        answer.answer_all(Fake(tokens=4).model(), make_questions(), batch=4)


def test_mcnemar_is_the_share_of_coin_rows_as_uneven():
    for coins in range(9):
        rows = [sum(row) for row in itertools.product((0, 1), repeat=coins)]
        for lost in range(coins + 1):
            uneven = [abs(2 * heads - coins) >= abs(2 * lost - coins) for heads in rows]
            expected = sum(uneven) / len(rows)
            assert compare.mcnemar(lost, coins - lost) == pytest.approx(expected, rel=1e-12)
    assert 0 <= compare.mcnemar(4000, 5000) < 1e-20


@pytest.mark.parametrize(("lose", "gain"), [(0.01, 0.01), (0.05, 0.1), (0.3, 0.1)])
def test_paired_interval_covers_the_true_difference(lose, gain):
    total, covered = 40, 0.0
    for lost in range(total + 1):
        for gained in range(total + 1 - lost):
            low, high = compare.paired_interval(lost, gained, total)
            if low <= 100 * (gain - lose) <= high:
                ways = math.comb(total, lost) * math.comb(total - lost, gained)
                rest = (1 - lose - gain) ** (total - lost - gained)
                covered += ways * lose**lost * gain**gained * rest
    assert covered > 0.93


def test_compare_counts_changed_answers():
    before = {"a": True, "b": True, "c": False, "d": True}
    found = compare.compare(before, {"a": True, "b": False, "c": True, "d": False})
    assert (found.total, found.lost, found.gained, found.difference) == (4, 2, 1, -25.0)
    assert found.interval[0] < -25 < found.interval[1]
    same = compare.compare(before, before)
    assert (same.difference, same.p_value) == (0.0, 1.0) and same.interval[1] > 0


def test_compare_refuses_other_questions():
    with pytest.raises(UserError, match="1 and 2 ids, 1 not in both"):
        compare.compare({"a": True}, {"a": True, "b": True})
    with pytest.raises(UserError, match="same questions"):
        compare.compare({}, {})


def test_gate_allows_a_drop_up_to_its_limit():
    assert compare.gate(61.2 - 60.7, 0.5) and compare.gate(-1.0, 0.0) and compare.gate(99.0, None)
    assert not compare.gate(0.51, 0.5)
