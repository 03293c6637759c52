"""Evaluation: scoring rule, sight test, paired comparison and answers of a fake backend."""

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
from nemo_vlm_ptq.evaluate import answers, comparison, gqa, sight
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.families.several_images import join_images

IMAGES, TOKENS = 5, 3  # number of images; image tokens per image


def make_questions(count=23):
    items = [
        Question(
            f"q{i:02d}", (f"scene{i % IMAGES}",), "w" * (i * 7 % 11 + 1), "yes", f"kind{i % 2}"
        )
        for i in range(count)
    ]
    return Questions("fake", tuple(items), lambda name: PIL.Image.new("L", (2, 2), int(name[-1])))


@dataclass
class FakeBackend:
    """Backend whose answers name the image and the question; counts preprocessing and encoding."""

    calls: Counter = field(default_factory=Counter)
    lengths: list = field(default_factory=list)
    tokens: int = TOKENS

    def preprocess(self, name, question, images):
        assert question.endswith(PROMPT_SUFFIX)
        if isinstance(images, PIL.Image.Image):
            self.calls["preprocessed"] += 1
            images = [ImageInputs(torch.full((1, 3, 2, 2), float(images.getpixel((0, 0)))))]
        else:
            assert all(image.pixel_values.is_meta for image in images)  # values were released
        words = len(question) - len(PROMPT_SUFFIX)
        ids = torch.tensor([0] * TOKENS * len(images) + [1] * words)
        return Sample(name, ids, ids == 0, join_images(images))

    def encode_images(self, pixels):
        self.calls["encoded"] += len(pixels.pixel_values)
        return pixels.pixel_values[:, 0, 0, :1].expand(self.tokens, 4)

    def generate(self, samples, features, max_new_tokens):
        assert max_new_tokens >= 8
        self.lengths.append([len(sample.input_ids) for sample in samples])
        pairs = zip(samples, features, strict=True)
        return [
            [
                int("".join(str(int(one)) for one in f[:: self.tokens, 0])),
                int(sample.input_ids.sum()),
            ]
            for sample, f in pairs
        ]

    def model(self, encoded_images=None):
        return answers.EvaluatedModel(
            backend=self,
            preprocess=self.preprocess,
            decode=lambda ids: "image {} words {}".format(*ids),
            encoded_images={} if encoded_images is None else encoded_images,
        )


@pytest.mark.parametrize(
    ("text", "right"),
    [("yes", True), (" Yes.\n", True), ("YES..", True), ("yes!", False), ("yes it is", False)],
)
def test_answers_match_by_llavas_rule(text, right):
    questions = make_questions(1)
    assert gqa.match_answers(questions, {"q00": text}) == {"q00": right}
    unnormalized = replace(questions, items=(replace(questions.items[0], answer="Yes."),))
    assert gqa.match_answers(unnormalized, {"q00": text}) == {"q00": right}


def test_score_counts_by_question_type_and_records_the_rule():
    questions = make_questions(10)
    given = {item.id: "yes" if item.id < "q03" else "no" for item in questions.items}
    found = gqa.score(questions, given)
    assert (found.rule, found.total, found.correct, found.accuracy) == ("llava", 10, 3, 30.0)
    assert found.by_kind == {"kind0": (2, 5), "kind1": (1, 5)}


def test_score_rejects_missing_answers_and_empty_data():
    with pytest.raises(UserError, match="missing for 2 of 3 questions of 'fake', first 'q01'"):
        gqa.score(make_questions(3), {"q00": "yes"})
    with pytest.raises(UserError, match="no questions"):
        gqa.score(make_questions(0), {})


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (5, 9), (300, 1000)])
def test_wilson_interval_contains_the_proportions_that_a_score_test_accepts(correct, total):
    shares = [i / 20000 for i in range(20001)]
    accepted = [
        100 * p
        for p in shares
        if abs(correct / total - p) <= 1.959964 * math.sqrt(p * (1 - p) / total)
    ]
    low, high = gqa.wilson_interval(correct, total)
    assert low == pytest.approx(accepted[0], abs=0.006)
    assert high == pytest.approx(accepted[-1], abs=0.006)
    assert 0 <= low < high <= 100
    assert (low == 0) == (correct == 0) and (high == 100) == (correct == total)


def test_swap_gives_each_question_another_image_and_uses_each_image_once():
    items = make_questions().items
    swapped = sight.swap_images(items)
    assert all(swapped[item.id] != item.images for item in items)
    assert len({(item.images, swapped[item.id]) for item in items}) == IMAGES
    assert set(swapped.values()) == {item.images for item in items}
    assert sight.swap_images(random.Random(0).sample(items, len(items))) == swapped


def test_swap_rejects_a_single_image():
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        sight.swap_images([replace(item, images=("one",)) for item in make_questions().items])


@pytest.mark.parametrize(
    ("own", "swapped", "own_16bit", "swapped_16bit", "expected"),
    [
        (80, 40, 82, 40, "sees"),
        (80, 60, 82, 40, "ignores images"),
        (61, 40, 82, 40, "sees"),
        (60.9, 40, 82, 40, "ignores images"),
        (45, 40, None, None, "sees"),
        (44.9, 40, None, None, "ignores images"),
        (44, 40, 80, None, "ignores images"),
        (40, 40, 40, 41, "16 bit ignores images"),
        (40, 40, 40, 40, "16 bit ignores images"),
    ],
)
def test_a_model_uses_images_if_half_of_the_gap_is_left(
    own, swapped, own_16bit, swapped_16bit, expected
):
    accuracies = (own, swapped, own_16bit, swapped_16bit)
    assert sight.uses_images(*accuracies) == (expected == sight.VERDICT_SEES)
    line = sight.verdict(*accuracies)
    assert line.startswith(f"{expected}: ") and "\n" not in line


def test_verdict_names_a_16_bit_model_that_ignores_images_as_the_cause():
    reason = "16 bit: 0.0; use questions that need the image"
    assert reason in sight.verdict(40, 40, 40, 40)
    assert "use questions" not in sight.verdict(50, 40, 40, 40)
    assert "use questions" not in sight.verdict(40, 40, 50, 40)


def test_answers_belong_to_their_question_and_image():
    questions = make_questions()
    found = answers.generate_answers(FakeBackend().model(), questions, batch_size=4)
    assert list(found) == [item.id for item in questions.items]
    for item in questions.items:
        assert found[item.id] == f"image {item.images[0][-1]} words {len(item.text)}"


def test_answers_do_not_depend_on_order_or_batch_size():
    questions = make_questions()
    reversed_ = replace(questions, items=questions.items[::-1])
    found = answers.generate_answers(FakeBackend().model(), questions, batch_size=4)
    assert answers.generate_answers(FakeBackend().model(), reversed_, batch_size=4) == found
    assert answers.generate_answers(FakeBackend().model(), questions, batch_size=1000) == found


def test_batches_are_sorted_by_length_and_progress_is_reported():
    fake, reported = FakeBackend(), []
    answers.generate_answers(
        fake.model(), make_questions(), batch_size=10, progress=lambda *now: reported.append(now)
    )
    assert [len(batch) for batch in fake.lengths] == [10, 10, 3]
    lengths = list(itertools.chain(*fake.lengths))
    assert lengths == sorted(lengths)
    assert reported == [(10, 23), (20, 23), (23, 23)]


def test_each_image_is_preprocessed_and_encoded_once_over_runs_and_formats():
    questions, encoded_images = make_questions(), {}
    loaded = Counter()

    def load_image(name):
        loaded[name] += 1
        return make_questions().load_image(name)

    questions = replace(questions, load_image=load_image)
    first, second = FakeBackend(), FakeBackend()
    answers.generate_answers(first.model(encoded_images), questions, batch_size=4)
    assert loaded == {f"scene{i}": 1 for i in range(IMAGES)}
    assert first.calls == {"preprocessed": IMAGES, "encoded": IMAGES}
    swapped = sight.swap_images(questions.items)
    found = answers.generate_answers(second.model(encoded_images), questions, swapped, batch_size=4)
    assert not second.calls and loaded.total() == IMAGES
    assert all(text.startswith(f"image {swapped[name][0][-1]} ") for name, text in found.items())


def test_a_question_about_several_images_sees_them_in_order():
    questions = make_questions()
    names = {f"q{i:02d}": (f"scene{i % 4 + 1}", f"scene{i % 3 + 1}", "scene4") for i in range(9)}
    items = tuple(replace(q, images=names.get(q.id, q.images)) for q in questions.items)
    questions, fake = replace(questions, items=items), FakeBackend()
    found = answers.generate_answers(fake.model(), questions, batch_size=4)
    for item in items:
        digits = int("".join(name[-1] for name in item.images))
        assert found[item.id] == f"image {digits} words {len(item.text)}"
    assert fake.calls == {"preprocessed": IMAGES, "encoded": IMAGES}
    swapped = sight.swap_images(items)
    for item in items:
        assert len(swapped[item.id]) == len(item.images)
        assert all(a != b for a, b in zip(swapped[item.id], item.images, strict=True))


def test_image_tokens_and_features_must_match():
    with pytest.raises(UserError, match="prompt has 3 image tokens but image 'scene0' has 4"):
        answers.generate_answers(FakeBackend(tokens=4).model(), make_questions(), batch_size=4)


def test_mcnemar_p_value_is_the_share_of_outcomes_at_least_as_uneven():
    for coins in range(9):
        outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=coins)]
        for lost in range(coins + 1):
            uneven = [abs(2 * heads - coins) >= abs(2 * lost - coins) for heads in outcomes]
            expected = sum(uneven) / len(outcomes)
            assert comparison.mcnemar_p_value(lost, coins - lost) == pytest.approx(
                expected, rel=1e-12
            )
    assert 0 <= comparison.mcnemar_p_value(4000, 5000) < 1e-20


@pytest.mark.parametrize(("lose", "gain"), [(0.01, 0.01), (0.05, 0.1), (0.3, 0.1)])
def test_paired_interval_covers_the_true_difference(lose, gain):
    total, covered = 40, 0.0
    for lost in range(total + 1):
        for gained in range(total + 1 - lost):
            low, high = comparison.paired_interval(lost, gained, total)
            if low <= 100 * (gain - lose) <= high:
                ways = math.comb(total, lost) * math.comb(total - lost, gained)
                rest = (1 - lose - gain) ** (total - lost - gained)
                covered += ways * lose**lost * gain**gained * rest
    assert covered > 0.93


def test_compare_counts_changed_answers():
    before = {"a": True, "b": True, "c": False, "d": True}
    found = comparison.compare(before, {"a": True, "b": False, "c": True, "d": False})
    assert (found.total, found.lost, found.gained, found.difference) == (4, 2, 1, -25.0)
    assert found.interval[0] < -25 < found.interval[1]
    same = comparison.compare(before, before)
    assert (same.difference, same.p_value) == (0.0, 1.0) and same.interval[1] > 0


def test_compare_rejects_different_questions():
    with pytest.raises(UserError, match="1 and 2 ids, 1 not in both"):
        comparison.compare({"a": True}, {"a": True, "b": True})
    with pytest.raises(UserError, match="same questions"):
        comparison.compare({}, {})


def test_gate_allows_a_drop_up_to_its_limit():
    assert comparison.passes_gate(61.2 - 60.7, 0.5)
    assert comparison.passes_gate(-1.0, 0.0)
    assert comparison.passes_gate(99.0, None)
    assert not comparison.passes_gate(0.51, 0.5)
