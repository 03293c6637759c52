"""Samples of a micro-batch, prepared by several threads."""

import pytest
import torch
from bad_models import TINY

from nemo_vlm_ptq.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.stages import observing


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-phi", "tiny-vila"])
def test_threads_prepare_the_samples_of_one_in_their_order(monkeypatch, name):
    words = [f"model={TINY.parent / name}", "calibration.samples=64", "calibration.micro_batch=32"]
    plan = make_plan(load_recipe("quickstart", words))
    made = {}
    for cores in (1, 64):
        monkeypatch.setattr(observing, "own_cores", lambda cores=cores: cores)
        chunks, prepare = observing.calibration_chunks(plan)
        made[cores] = [sample for chunk in chunks for sample in prepare(chunk)]
    assert [sample.id for sample in made[64]] == [item.id for chunk in chunks for item in chunk]
    for one, many in zip(*made.values(), strict=True):
        assert torch.equal(one.input_ids, many.input_ids)
        assert torch.equal(one.pixels.views, many.pixels.views)
