"""Samples of a micro-batch, prepared by several threads."""

import json
import shutil

import pytest
import torch
from bad_models import TINY

from nemo_vlm_ptq.families.shared import load_tokenizer
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.stages import observe as observing

CUT = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
FILLED = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
          "pad_type_id": 0, "pad_token": "<unk>"}  # fmt: skip


def prepared(monkeypatch, folder, cores, looks=True):
    """Chunks of a model, and their samples made by so many threads on a rank that looks or not."""
    words = [f"model={folder}", "calibration.samples=64", "calibration.micro_batch=32"]
    plan = make_plan(load_recipe("quickstart", words))
    monkeypatch.setattr(observing, "own_cores", lambda: cores)
    chunks, prepare = observing.calibration_micro_batches(plan)
    return chunks, [sample for chunk in chunks for sample in prepare(chunk, looks)]


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-phi", "tiny-vila"])
def test_threads_prepare_the_samples_of_one_in_their_order(monkeypatch, name):
    _, alone = prepared(monkeypatch, TINY.parent / name, 1)
    chunks, together = prepared(monkeypatch, TINY.parent / name, 64)
    assert [sample.id for sample in together] == [item.id for chunk in chunks for item in chunk]
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one.input_ids, many.input_ids)
        assert torch.equal(one.pixels.pixel_values, many.pixels.pixel_values)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-phi", "tiny-vila"])
def test_a_rank_that_does_not_look_has_the_same_tokens(monkeypatch, name):
    _, seen = prepared(monkeypatch, TINY.parent / name, 1)
    _, blind = prepared(monkeypatch, TINY.parent / name, 1, looks=False)
    for one, other in zip(seen, blind, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.is_image, other.is_image)
        assert (other.pixels is observing.PLACEHOLDER_IMAGE) is (
            name != "tiny-phi"
        )  # whose images differ


def test_what_a_tokenizers_file_says_of_cutting_and_filling_is_off_before_threads_ask(tmp_path):
    """transformers switches it off when it is first asked, which fails while others ask."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"truncation": CUT, "padding": FILLED}))
    tokenizer = load_tokenizer(folder).backend_tokenizer
    assert tokenizer.truncation is None and tokenizer.padding is None
