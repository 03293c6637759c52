"""LLaVA-OneVision: prompts and tiles, and where the head is."""

import json

import pytest
import torch
from bad_models import said_by, write_recipe
from processors import write_llava_onevision_processor
from reference_llava_next import IMAGE_TOKEN, SIDE
from reference_llava_onevision import PINPOINTS, VIDEO_TOKEN, write_llava_onevision
from safetensors.torch import load_file, save_file
from test_family_prompts import (
    ANSWER,
    QUESTION,
    check_placeholders_are_rejected,
    check_sample,
    random_image,
)
from transformers import AutoTokenizer
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from nemo_vlm_ptq.families import llava_onevision
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision") / "model"
    write_llava_onevision(folder, 0)
    write_llava_onevision_processor(folder)
    return folder


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def published_text(rendered, size):
    """Return a rendered prompt with the image expanded by transformers' processor.

    The processor itself needs torchvision.
    """
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=PINPOINTS)
    processor.num_image_tokens, processor.vision_aspect_ratio = 16, "anyres_max_2"
    processor.vision_feature_select_strategy = "full"
    (text,), _ = processor._expand_image_tokens(
        [rendered], iter([size]), SIDE, SIDE, "<image>", iter([1])
    )
    return text


@pytest.mark.parametrize("size", [(70, 50), (20, 90), (32, 32), (90, 20), (64, 64)])
def test_prompts_and_tiles_match_the_published_processor(folder, size):
    preprocess = llava_onevision.make_preprocessor(folder, read_config(folder))
    sample = preprocess("q", QUESTION, random_image(*size))
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=PINPOINTS)
    expected = processor(random_image(*size), return_tensors="pt")
    assert torch.equal(sample.images.pixel_values, expected["pixel_values"])
    assert sample.images.image_sizes.tolist() == expected["image_sizes"].tolist()
    assert sample.images.image_sizes.tolist() == [[*size[::-1]]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = published_text(f"user <image>\n{QUESTION} assistant:\n", [*size[::-1]])
    check_sample(sample, tokenizer(text)["input_ids"], IMAGE_TOKEN)
    again = preprocess("q", QUESTION, sample.images.to_meta(), ANSWER)
    check_sample(again, tokenizer(text + ANSWER)["input_ids"], IMAGE_TOKEN)


def test_prompts_without_an_image_and_with_an_image_in_the_question(folder):
    preprocess = llava_onevision.make_preprocessor(folder, read_config(folder))
    ids = AutoTokenizer.from_pretrained(folder)(f"user {QUESTION} assistant:\n")["input_ids"]
    check_sample(preprocess("q", QUESTION), ids, IMAGE_TOKEN, has_image=False)
    check_placeholders_are_rejected(preprocess, "<image>")


def test_grids_must_be_those_of_the_config(folder):
    config = read_config(folder) | {"image_grid_pinpoints": [[32, 32]]}
    said = said_by(llava_onevision.make_preprocessor, folder, config)
    assert said.startswith(f"{folder}: image_grid_pinpoints of the image processor are not those")


def test_videos_are_refused(folder):
    ids = torch.tensor([5, VIDEO_TOKEN, 6])
    said = said_by(llava_onevision.find_placeholders, read_config(folder), ids, None)
    assert said == "videos are not supported"


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_said_in_either_config_and_a_stored_head_is_taken(tmp_path, stored):
    folder = tmp_path / "model"
    write_llava_onevision(folder, 0, tied=True)
    assert read_config(folder)["tie_word_embeddings"] is False
    if stored:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {HEAD: 2 * tensors[EMBEDDING]}, folder / "model.safetensors")
    recipe = write_recipe(tmp_path, folder, evaluate={"data": None})
    plan = make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))
    assert plan.decoder.tied_head is not stored
    assert plan.export_config["tie_word_embeddings"] is not stored
    assert plan.export_config["text_config"]["tie_word_embeddings"] is not stored
