"""The model folder assets/tiny-qwen3-vl: small, loaded by transformers, and with its logits."""

import pytest
import torch
from bad_models import ROOT

from nemo_vlm_ptq.data.glyphs import COLUMNS
from nemo_vlm_ptq.data.hard_drafts import NUMBERS
from nemo_vlm_ptq.data.hard_scenes import SHAPES
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.data.scenes import COLORS
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel

FOLDER = ROOT / "assets" / "tiny-qwen3-vl"
TOLERANCE = 1e-4  # of float32 logits


@pytest.fixture(scope="module")
def plan():
    return make_plan(load_recipe("quickstart_qwen3_vl", [f"model={FOLDER}"]))


@pytest.fixture(scope="module")
def published():
    """transformers' model of the folder, in float32."""
    from transformers import Qwen3VLForConditionalGeneration

    model, info = Qwen3VLForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def test_the_folder_is_small_and_holds_bfloat16(plan):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12e6
    assert plan.dtype == "bfloat16" and plan.family.name == "qwen3_vl"


def test_logits_are_those_of_transformers_for_one_image_and_for_two(plan, published):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    checkpoint = read_source(plan.tensors)
    vision = {name: checkpoint.plain[name] for name in plan.vision_names}
    device = torch.device("cpu")
    model = ReferenceModel(plan.family, plan.config, checkpoint, vision, torch.float32, device)
    preprocess = plan.family.make_preprocessor(plan.folder, plan.config)
    processor = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
    questions, asked = load_questions("hard_scenes", "test", None), {}
    for item in questions.items[:20]:
        asked.setdefault(len(item.images), item)
    assert sorted(asked) == [1, 2]
    for item in asked.values():
        images = questions.load_images(item)
        sample = preprocess(item.id, item.text + PROMPT_SUFFIX, images)
        inputs = processor(images, return_tensors="pt")
        assert torch.equal(sample.images.grids, inputs["image_grid_thw"])
        ids, types = sample.input_ids[None], sample.is_image[None].int()
        with torch.no_grad():
            expected = published(input_ids=ids, mm_token_type_ids=types, **inputs).logits[0]
        found = model.logits(sample, model.encode_images(sample.images))
        assert (found - expected).abs().max() < TOLERANCE


def test_letters_on_signs_and_answers_are_whole_tokens(plan):
    tokenizer = load_tokenizer(plan.folder)
    for word in (*COLORS, *SHAPES, *NUMBERS, "first", "second", "yes", "no"):
        assert len(tokenizer(word)["input_ids"]) == 1, word
    for letter in COLUMNS:
        assert len(tokenizer(letter * 3)["input_ids"]) == 3
