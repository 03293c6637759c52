"""SmolVLM and Idefics3: prompts and tiles, masks in the inputs of logits, and where the head is."""

import json

import pytest
import torch
from bad_models import said_by, write_recipe
from processors import write_smolvlm_processor
from reference_smolvlm import IMAGE_TOKEN, SIDE, TILE_TOKENS, smolvlm_cases, write_smolvlm
from safetensors.torch import save_file
from test_family_prompts import (
    ANSWER,
    QUESTION,
    check_placeholders_are_rejected,
    check_sample,
    random_image,
)
from transformers import AutoTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from nemo_vlm_ptq.families import smolvlm
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.stages.logits_inputs import read_inputs

RENDERED = f"<s>User:<image>{QUESTION}\nAssistant:"
MARKS = ("<fake_token_around_image>", "<image>", "<global-img>")


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def folder(request, tmp_path_factory):
    """The folder of a model of each class."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    write_smolvlm(folder, 0, request.param)
    write_smolvlm_processor(folder, request.param)
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def plan_of(home, folder):
    recipe = write_recipe(home, folder, evaluate={"data": None})
    return make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))


def own_inputs(folder, image):
    """Return the ids of a question, and the pixels, of the folder's own processor.

    SmolVLMProcessor itself needs torchvision, for videos.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if folder.name == "idefics3":
        processor = Idefics3ImageProcessorPil.from_pretrained(folder)
        own = Idefics3Processor(processor, tokenizer, image_seq_len=TILE_TOKENS)
        inputs = own(text=RENDERED, images=[image], add_special_tokens=False)
        return inputs["input_ids"][0], torch.as_tensor(inputs["pixel_values"])
    processor = SmolVLMImageProcessorPil.from_pretrained(folder)
    inputs = processor(image, return_row_col_info=True, return_tensors="pt")
    cut = inputs["rows"][0][0], inputs["cols"][0][0]
    text = RENDERED.replace("<image>", get_image_prompt_string(*cut, TILE_TOKENS, *MARKS))
    return tokenizer(text, add_special_tokens=False)["input_ids"], inputs["pixel_values"]


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize(
    ("size", "tiles"), [((90, 40), 3), ((20, 90), 3), ((64, 61), 5), ((9, 400), 3), ((32, 32), 5)]
)
def test_prompts_and_tiles_are_those_of_the_own_processor(folder, size, tiles, splits):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_image_splitting": splits}))
    preprocess = smolvlm.make_preprocessor(folder, read_config(folder))
    sample = preprocess("q", QUESTION, random_image(*size))
    ids, pixels = own_inputs(folder, random_image(*size))
    assert len(sample.images) == (tiles if splits else 1)
    assert torch.equal(sample.images.pixel_values, pixels[0])
    check_sample(sample, ids, IMAGE_TOKEN)
    again = preprocess("q", QUESTION, sample.images, ANSWER)
    assert again.input_ids.tolist()[: len(ids)] == ids
    text = AutoTokenizer.from_pretrained(folder).decode(again.input_ids[len(ids) :])
    assert text.translate({ord(" "): "", ord("▁"): ""}) == ANSWER


def test_a_prompt_without_an_image_has_no_marks(folder):
    preprocess = smolvlm.make_preprocessor(folder, read_config(folder))
    text = f"<s>User: {QUESTION}\nAssistant:"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    check_sample(preprocess("q", QUESTION), ids, IMAGE_TOKEN, has_image=False)
    check_placeholders_are_rejected(preprocess, "<image>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_image_size": {"longest_edge": 16}},
         "the image processor does not match the vision tower: an image of 32*64 pixels becomes "
         "16*16, expected 32*32"),
        ({"max_image_size": {"longest_edge": 0}},
         "max_image_size must be pixels from 1 to 2048, got {'longest_edge': 0}"),
        ({"max_image_size": {"edge": 32}},
         "max_image_size must be pixels from 1 to 2048, got {'edge': 32}"),
        ({"size": {"longest_edge": 10**6}},
         "size must be pixels from 1 to 2048, got {'longest_edge': 1000000}"),
        ({"do_image_splitting": 1}, "do_image_splitting must be true or false, got 1"),
        ({"image_processor_type": "CLIPImageProcessor"},
         "image processor 'CLIPImageProcessor' is not supported for this model; supported: "
         "SmolVLMImageProcessor, Idefics3ImageProcessor"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(tmp_path, folder, settings, message):
    write_smolvlm_processor(tmp_path, folder.name)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    said = said_by(smolvlm.make_preprocessor, tmp_path, read_config(folder))
    assert said.endswith(message)


@pytest.mark.parametrize(("stored", "flag"), [(True, True), (True, False), (False, True)])
def test_the_head_is_that_of_the_checkpoint_if_it_has_one(tmp_path, stored, flag):
    folder = tmp_path / "model"
    write_smolvlm(folder, 0, "smolvlm", tied=not stored)
    write_smolvlm_processor(folder, "smolvlm")
    config = read_config(folder) | {"tie_word_embeddings": flag}
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_of(tmp_path, folder)
    assert plan.decoder.tied_head is not stored
    assert plan.export_config["tie_word_embeddings"] is not stored
    assert plan.export_config["text_config"]["tie_word_embeddings"] is not stored


def batch_of(questions):
    """Return the inputs of several rows as the processor pads them, on the right."""
    length = max(len(one.ids) for one in questions)
    tiles = max(one.pixel_values.shape[1] for one in questions)
    count = len(questions)
    ids = torch.zeros(count, length, dtype=torch.int64)
    pixels = torch.zeros(count, tiles, 3, SIDE, SIDE)
    mask = torch.zeros(count, tiles, SIDE, SIDE, dtype=torch.int64)
    for row, one in enumerate(questions):
        found = one.pixel_values.shape[1]
        ids[row, : len(one.ids)] = one.ids
        pixels[row, :found], mask[row, :found] = one.pixel_values[0], one.pixel_attention_mask[0]
    attention = (ids != 0).long()
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


@pytest.mark.parametrize("masked", [True, False])
def test_logits_of_padded_rows_are_those_of_transformers(tmp_path, masked):
    folder = tmp_path / "idefics3"
    reference = write_smolvlm(folder, 0, "idefics3")
    write_smolvlm_processor(folder, "idefics3")
    inputs = batch_of(smolvlm_cases(1, reference)["images"])
    if not masked:
        del inputs["pixel_attention_mask"]
    with torch.no_grad():
        expected = reference.model(**inputs).logits
    save_file(inputs, tmp_path / "in")
    plan = plan_of(tmp_path, folder)
    samples, masks = read_inputs(plan, tmp_path / "in")
    assert [len(sample.images) for sample in samples] == [3, 8]
    checkpoint = read_source(plan.tensors)
    vision = {name: checkpoint.plain[name] for name in plan.vision_names}
    cpu = torch.device("cpu")
    model = ReferenceModel(plan.family, plan.config, checkpoint, vision, torch.float32, cpu)
    for row, (sample, kept) in enumerate(zip(samples, masks, strict=True)):
        logits = model.logits(sample, model.encode_images(sample.images), kept)
        count = int(kept.sum())
        torch.testing.assert_close(logits[:count], expected[row, :count], rtol=0, atol=1e-4)


TILES, MASK = torch.full((1, 1, 3, SIDE, SIDE), 0.5), torch.ones(1, 1, SIDE, SIDE).long()


@pytest.mark.parametrize(
    ("tokens", "pixels", "mask", "message"),
    [
        (3, TILES, MASK,
         "row 0 of input_ids: the number of image tokens must be a multiple of 4, the tokens of "
         "one tile, got 3"),
        (8, TILES, None, "row 0 of input_ids has 2 images, and 1 images remain"),
        (4, 0 * TILES, MASK, "row 0 of input_ids has 1 images, and 0 images remain"),
        (4, TILES[0], None,
         "pixel_values must be numbers [1,tiles,3,h,w], a row for each of input_ids, got float32 "
         "[1, 3, 32, 32]"),
        (4, TILES[..., :16], None,
         "row 0: pixel_values [1, 3, 32, 16] do not suit the vision tower: tiles must have 32*32 "
         "pixels"),
        (4, TILES, MASK[0], "pixel_attention_mask must be integers [1, 1, 32, 32], got int64 "
         "[1, 32, 32]"),
        (4, TILES, MASK.float(), "pixel_attention_mask must be integers [1, 1, 32, 32], got "
         "float32 [1, 1, 32, 32]"),
        (4, TILES, 2 * MASK, "pixel_attention_mask must hold 0 and 1 only"),
        (4, TILES, 0 * MASK,
         "pixel_attention_mask must be 1 at the first pixel of each tile with an image"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_suit_the_tiles_are_refused(
    tmp_path, folder, tokens, pixels, mask, message
):
    tensors = {"input_ids": torch.full((1, tokens), IMAGE_TOKEN), "pixel_values": pixels}
    tensors |= {} if mask is None else {"pixel_attention_mask": mask}
    save_file({name: one.contiguous() for name, one in tensors.items()}, tmp_path / "in")
    assert said_by(read_inputs, plan_of(tmp_path, folder), tmp_path / "in") == message
