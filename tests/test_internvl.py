"""InternVL: prompts and tiles, rows of tiles in the inputs of logits, and where the head is."""

import json
from types import SimpleNamespace

import pytest
import torch
from bad_models import said_by, write_recipe
from processors import write_internvl_processor
from reference_internvl import (
    IMAGE_TOKEN,
    MOST_TILES,
    SIDE,
    TILE_TOKENS,
    InternVL,
    internvl_cases,
    write_internvl,
)
from safetensors.torch import load_file, save_file
from test_family_prompts import (
    ANSWER,
    QUESTION,
    check_placeholders_are_rejected,
    check_sample,
    random_image,
)
from transformers import AutoTokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from nemo_vlm_ptq.checkpoints.model_config import merge_config
from nemo_vlm_ptq.families import internvl
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.stages.logits_inputs import read_inputs

MARKS = {"start_image_token": "<img>", "end_image_token": "</img>"}
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model with the decoder of Qwen2."""
    folder = tmp_path_factory.mktemp("internvl") / "model"
    write_internvl(folder, 0, "qwen2")
    write_internvl_processor(folder)
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def plan_of(home, folder):
    recipe = write_recipe(home, folder, evaluate={"data": None})
    return make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))


def published_text(rendered, tiles):
    """Return a rendered prompt with the image expanded by transformers' processor.

    The processor itself needs torchvision.
    """
    processor = SimpleNamespace(
        image_token="<IMG_CONTEXT>", video_token="<video>", image_seq_length=TILE_TOKENS, **MARKS
    )
    (text,), *_ = InternVLProcessor._insert_media_placeholders(
        processor, [rendered], torch.zeros(tiles), None, [tiles], [], [tiles], [], []
    )
    return text


@pytest.mark.parametrize(
    ("size", "tiles"), [((90, 40), 3), ((20, 90), 5), ((22, 20), 1), ((64, 61), 5), ((9, 400), 5)]
)
def test_prompts_and_tiles_match_the_published_processor(folder, size, tiles):
    preprocess = internvl.make_preprocessor(folder, read_config(folder))
    sample = preprocess("q", QUESTION, random_image(*size))
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_patches=MOST_TILES
    )
    expected = processor(random_image(*size), crop_to_patches=True, return_tensors="pt")
    assert expected["num_patches"].tolist() == [tiles] and len(sample.images) == tiles
    assert torch.equal(sample.images.pixel_values, expected["pixel_values"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = f"user:\n<IMG_CONTEXT>\n{QUESTION}\nassistant:\n"
    ids = tokenizer(published_text(rendered, tiles))["input_ids"]
    assert ids.count(IMAGE_TOKEN) == tiles * TILE_TOKENS
    check_sample(sample, ids, IMAGE_TOKEN)
    again = preprocess("q", QUESTION, sample.images.to_meta(), ANSWER)
    ids = tokenizer(published_text(rendered, tiles) + ANSWER)["input_ids"]
    check_sample(again, ids, IMAGE_TOKEN)


def test_a_prompt_without_an_image_has_no_marks(folder):
    preprocess = internvl.make_preprocessor(folder, read_config(folder))
    ids = AutoTokenizer.from_pretrained(folder)(f"user:\n{QUESTION}\nassistant:\n")["input_ids"]
    check_sample(preprocess("q", QUESTION), ids, IMAGE_TOKEN, has_image=False)
    check_placeholders_are_rejected(preprocess, "<IMG_CONTEXT>")


def test_marks_are_those_of_the_tokenizer(tmp_path):
    write_internvl(tmp_path / "model", 0, "qwen2")
    write_internvl_processor(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    marks = {"extra_special_tokens": {"start_image_token": "(", "end_image_token": ")"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | marks))
    preprocess = internvl.make_preprocessor(tmp_path / "model", read_config(tmp_path / "model"))
    sample = preprocess("q", QUESTION, random_image(22, 20))
    text = AutoTokenizer.from_pretrained(tmp_path / "model").decode(sample.input_ids)
    assert f"({'<IMG_CONTEXT>' * TILE_TOKENS})" in text.replace(" ", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_patches": 0}, "max_patches must be an integer from 1 to 144, got 0"),
        ({"min_patches": 10**6}, "min_patches must be an integer from 1 to 144, got 1000000"),
        ({"crop_to_patches": "yes"}, "crop_to_patches must be true or false, got 'yes'"),
        ({"size": {"height": 16, "width": 16}},
         "the image processor does not match the vision tower: an image of 32*64 pixels becomes "
         "16*16, expected 32*32"),
        ({"image_processor_type": "CLIPImageProcessor"},
         "image processor 'CLIPImageProcessor' is not supported for this model; supported: "
         "GotOcr2ImageProcessor"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    write_internvl_processor(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    write_internvl(tmp_path / "model", 0, "qwen2")
    said = said_by(internvl.make_preprocessor, tmp_path, read_config(tmp_path / "model"))
    assert said.endswith(message)


def test_a_folder_without_a_chat_template_or_an_image_token_is_refused(tmp_path, folder):
    config = read_config(folder)
    said = said_by(
        internvl.make_preprocessor, folder, merge_config(config, {"image_token_id": 600})
    )
    assert said == f"{folder}: the tokenizer has no token with image_token_id 600"
    write_internvl_processor(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    said = said_by(internvl.make_preprocessor, tmp_path, config)
    assert said.startswith(f"{tmp_path} has no chat template")


@pytest.mark.parametrize(("stored", "flag"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("rename", [False, True])
def test_the_head_is_that_of_the_checkpoint_if_it_has_one(tmp_path, stored, flag, rename):
    """transformers writes true unless told, and does not tie weights that differ."""
    folder = tmp_path / "model"
    write_internvl(folder, 0, "qwen2", tied=not stored)
    config = read_config(folder) | {"tie_word_embeddings": flag}
    (folder / "config.json").write_text(json.dumps(config))
    if rename:  # to the names of transformers in memory
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {in_memory(name): one for name, one in tensors.items()}, folder / "model.safetensors"
        )
    plan = plan_of(tmp_path, folder)
    assert plan.decoder.tied_head is not stored
    assert plan.export_config["tie_word_embeddings"] is not stored
    assert plan.export_config["text_config"]["tie_word_embeddings"] is not stored
    assert (HEAD in plan.tensors) is stored


def in_memory(name):
    """Return the name of a published tensor in transformers' model."""
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.").replace("model.", "language_model.", 1)
    return name if name.startswith("lm_head") else f"model.{name}"


def test_rows_of_tiles_are_read(tmp_path, folder):
    plan, (first, second) = plan_of(tmp_path, folder), internvl_cases(1, None)["images"]
    length = max(len(first.ids), len(second.ids))
    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[0, : len(first.ids)], ids[1, : len(second.ids)] = first.ids, second.ids
    pixels = torch.cat([first.pixel_values, second.pixel_values])
    save_file({"input_ids": ids, "pixel_values": pixels}, tmp_path / "in")
    samples, _ = read_inputs(plan, tmp_path / "in")
    assert [len(sample.images) for sample in samples] == [3, 6]
    for sample, question in zip(samples, (first, second), strict=True):
        assert torch.equal(sample.images.pixel_values, question.pixel_values)


def test_an_answer_is_that_of_transformers_and_ends_without_an_end_token(tmp_path, folder):
    plan = plan_of(tmp_path, folder)
    checkpoint = read_source(plan.tensors)
    vision = {name: checkpoint.plain[name] for name in plan.vision_names}
    device = torch.device("cpu")
    model = ReferenceModel(plan.family, plan.config, checkpoint, vision, torch.float32, device)
    assert not model.eos_token_ids
    sample = internvl.make_preprocessor(folder, plan.config)("q", QUESTION, random_image(90, 40))
    found = model.generate([sample], [model.encode_images(sample.images)], 4)
    expected = InternVL(0, "qwen2").model.generate(
        input_ids=sample.input_ids[None],
        pixel_values=sample.images.pixel_values,
        max_new_tokens=4,
        do_sample=False,
    )
    assert found == expected[:, len(sample.input_ids) :].tolist()


@pytest.mark.parametrize(
    ("tokens", "pixels", "message"),
    [
        (3, (1, 3, SIDE, SIDE),
         "row 0 of input_ids: the number of image tokens must be a multiple of 4, the tokens of "
         "one tile, got 3"),
        (8, (1, 3, SIDE, SIDE), "row 0 of input_ids has 2 images, and 1 images remain"),
        (4, (1, 2, 3, SIDE, SIDE),
         "pixel_values must be numbers [images,3,h,w], got float32 [1, 2, 3, 32, 32]"),
        (4, (1, 3, 2 * SIDE, 2 * SIDE),
         "row 0 of input_ids has 4 image tokens, and its images have 16 features"),
        (4097, None, "row 0 of input_ids has 4097 tokens, and the model has 4096 positions"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_suit_the_tiles_are_refused(tmp_path, folder, tokens, pixels, message):
    ids = torch.full((1, tokens), 5 if pixels is None else IMAGE_TOKEN)
    tensors = {} if pixels is None else {"pixel_values": torch.zeros(pixels)}
    save_file({"input_ids": ids, **tensors}, tmp_path / "in")
    assert said_by(read_inputs, plan_of(tmp_path, folder), tmp_path / "in") == message
