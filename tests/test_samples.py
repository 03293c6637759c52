"""Preprocessing of calibration micro-batches by several threads."""

import json
import os
import shutil
import threading
import time
from importlib import import_module

import pytest
import torch
from bad_models import TINY

from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe

# `nemo_vlm_ptq.stages` exports a function of the same name, which hides the module.
observe = import_module("nemo_vlm_ptq.stages.observe")

TRUNCATION = {
    "direction": "Right",
    "max_length": 16,
    "strategy": "LongestFirst",
    "stride": 0,
}
PADDING = {
    "strategy": {"Fixed": 99},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unk>",
}


def preprocess_all(monkeypatch, folder, cores, encodes_images=True):
    """Return a model's micro-batches and their samples, made on a rank with `cores` cores."""
    overrides = [f"model={folder}", "calibration.samples=64", "calibration.micro_batch=32"]
    plan = make_plan(load_recipe("quickstart", overrides))
    monkeypatch.setattr(observe, "cores_per_rank", lambda: cores)
    micro_batches, preprocess = observe.calibration_micro_batches(plan)
    samples = [
        sample
        for micro_batch in micro_batches
        for sample in preprocess(micro_batch, encodes_images)
    ]
    return micro_batches, samples


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-phi", "tiny-vila"])
def test_several_threads_return_the_samples_of_one_thread_in_order(monkeypatch, name):
    _, expected = preprocess_all(monkeypatch, TINY.parent / name, 1)
    micro_batches, found = preprocess_all(monkeypatch, TINY.parent / name, 64)
    ids = [question.id for micro_batch in micro_batches for question in micro_batch]
    assert [sample.id for sample in found] == ids
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.images.pixel_values, other.images.pixel_values)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-phi", "tiny-vila"])
def test_a_rank_that_does_not_encode_images_has_the_same_tokens(monkeypatch, name):
    _, encoding = preprocess_all(monkeypatch, TINY.parent / name, 1)
    _, other = preprocess_all(monkeypatch, TINY.parent / name, 1, encodes_images=False)
    for expected, found in zip(encoding, other, strict=True):
        assert torch.equal(expected.input_ids, found.input_ids)
        assert torch.equal(expected.is_image, found.is_image)
        # tiny-phi needs the image, as its size determines the number of tokens.
        is_empty = found.images is observe.EMPTY_IMAGE
        assert is_empty is (name != "tiny-phi")


def test_truncation_and_padding_of_a_tokenizer_file_are_disabled_when_it_is_loaded(tmp_path):
    """transformers disables them in the first call, which fails during calls of other threads."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"truncation": TRUNCATION, "padding": PADDING}))
    tokenizer = load_tokenizer(folder).backend_tokenizer
    assert tokenizer.truncation is None and tokenizer.padding is None


def test_threads_that_load_tokenizers_leave_stdout_and_stderr_as_they_were(monkeypatch):
    pauses = iter((0.2, 0.5))  # the second to start would end last

    def load(*_, **__):
        time.sleep(next(pauses))
        return lambda _: None

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    before = [os.fstat(number) for number in (1, 2)]
    threads = [threading.Thread(target=load_tokenizer, args=(TINY,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(os.path.samestat, before, [os.fstat(number) for number in (1, 2)]))
