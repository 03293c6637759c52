"""Output layers of Qwen-VL: the checkpoint's own where it has one, whatever config.json says."""

import json

import pytest
import torch
from bad_models import write_recipe
from reference_qwen import qwen_cases, write_qwen
from transformers import AutoModelForImageTextToText

from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel


@pytest.mark.parametrize(("stored", "stated"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
def test_the_head_of_the_checkpoint_is_taken_as_in_transformers(tmp_path, family, stored, stated):
    folder = tmp_path / "model"
    reference = write_qwen(folder, 0, family, tied=not stored)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = stated
    (folder / "config.json").write_text(json.dumps(config))
    (question,) = qwen_cases(1, reference)["text"][:1]
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = loaded(input_ids=question.ids[None]).logits[0]
    torch.testing.assert_close(reference.logits(question), expected, rtol=0, atol=1e-4)

    recipe = write_recipe(tmp_path, folder, evaluate={"data": None})
    plan = make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))
    assert plan.decoder.tied_head is not stored
    assert plan.export_config["tie_word_embeddings"] is not stored
    read, cpu = read_source(plan.tensors), torch.device("cpu")
    vision = {name: read.plain[name] for name in plan.vision_names}
    model = ReferenceModel(plan.family, plan.config, read, vision, torch.float32, cpu)
    positions = torch.arange(len(question.ids)).expand(3, -1)
    sample = Sample("q", question.ids, torch.zeros(len(question.ids)).bool(), None, positions)
    torch.testing.assert_close(model.logits(sample, None), expected, rtol=0, atol=1e-4)
