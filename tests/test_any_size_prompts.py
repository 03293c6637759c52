"""Prompts, positions and pixels of families that take images of any size."""

import json

import pytest
import reference_mistral3
import reference_qwen
import torch
from bad_models import said_by, write_recipe
from processors import write_mistral3, write_qwen
from safetensors.torch import save_file
from test_family_prompts import ANSWER, QUESTION, check_placeholders_are_rejected, random_image
from transformers import AutoTokenizer

from nemo_vlm_ptq.families import FAMILIES, read_config
from nemo_vlm_ptq.families.base import ImageInputs
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.stages.logits_inputs import read_inputs

SIZES = [(64, 64), (90, 40), (33, 70), (20, 20)]  # width, height


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> a random model folder with all its files."""
    home = tmp_path_factory.mktemp("any_size")
    for family in ("qwen3_vl", "qwen3_5", "qwen2_vl"):
        write_qwen(home / family, family)
    write_mistral3(home / "mistral3")
    write_mistral3(home / "pixtral" / "mistral3", "pixtral")
    return home


def preprocessor(folder):
    return FAMILIES[folder.name].make_preprocessor(folder, read_config(folder))


def text_of(folder, sample):
    """Return the text of a sample's ids, special tokens included, without added spaces."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return (
        tokenizer.decode(sample.input_ids)
        .translate({ord(" "): "", ord("▁"): ""})
        .removeprefix("<s>")
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "qwen2_vl"])
@pytest.mark.parametrize("size", SIZES)
def test_qwen_expands_its_image_token_by_the_grid(folders, family, size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder, image = folders / family, random_image(*size)
    sample = preprocessor(folder)("q", QUESTION, image, ANSWER)
    expected = Qwen2VLImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
    assert torch.equal(sample.images.pixel_values, expected["pixel_values"])
    assert torch.equal(sample.images.grids, expected["image_grid_thw"])
    count = int(expected["image_grid_thw"].prod()) // 4
    question = QUESTION.replace(" ", "")
    image_text = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
    assert text_of(folder, sample) == f"user:\n{image_text}{question}assistant:\n{ANSWER}"
    assert int(sample.is_image.sum()) == count


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "qwen2_vl"])
def test_positions_are_those_of_transformers(folders, family):
    reference = reference_qwen.QwenVL(0, family)
    preprocess = preprocessor(folders / family)
    for size in [*SIZES, None]:
        image = None if size is None else random_image(*size)
        sample = preprocess("q", QUESTION, image)
        ids = sample.input_ids[None]
        grids = None if sample.images is None else sample.images.grids
        expected, _ = reference.model.model.get_rope_index(
            ids, mm_token_type_ids=sample.is_image[None].int(), image_grid_thw=grids
        )
        assert torch.equal(sample.positions, expected[:, 0])


def test_positions_of_several_images_are_those_of_transformers():
    reference = reference_qwen.QwenVL(0, "qwen3_vl")
    family = FAMILIES["qwen3_vl"]
    for question in reference_qwen.qwen_cases(3, reference)["images"]:
        is_image, ids = question.ids == reference_qwen.IMAGE_TOKEN, question.ids[None]
        expected, _ = reference.model.model.get_rope_index(
            ids, mm_token_type_ids=is_image[None].int(), image_grid_thw=question.image_grid_thw
        )
        config = reference_qwen.published_config(reference)
        inputs = ImageInputs(question.pixel_values, grids=question.image_grid_thw)
        found = family.find_placeholders(config, question.ids, inputs)
        assert found.num_images == len(question.image_grid_thw)
        assert torch.equal(family.positions(config, is_image, inputs), expected[:, 0])


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("mistral3", reference_mistral3.PATCH * reference_mistral3.MERGE),
        ("pixtral/mistral3", reference_mistral3.PATCH),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_mistral3_writes_image_tokens_in_rows(folders, name, side, size):
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    folder, image = folders / name, random_image(*size)
    sample = preprocessor(folder)("q", QUESTION, image, ANSWER)
    processor = PixtralImageProcessorPil.from_pretrained(folder)
    expected = processor(image, patch_size=side, return_tensors="pt")
    assert torch.equal(sample.images.pixel_values, expected["pixel_values"])
    height, width = sample.images.pixel_values.shape[-2:]
    row = "[IMG]" * (width // side)
    rows = "[IMG_BREAK]".join([row] * (height // side)) + "[IMG_END]"
    question = QUESTION.replace(" ", "")
    assert text_of(folder, sample) == f"[INST]{rows}{question}[/INST]{ANSWER}"
    assert int(sample.is_image.sum()) == width * height // side**2


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "qwen2_vl", "mistral3"])
def test_max_pixels_bounds_the_area_of_an_image(folders, family):
    preprocess, image = preprocessor(folders / family), random_image(60, 64)
    whole = preprocess("q", QUESTION, image)
    capped = preprocess("q", QUESTION, image, max_pixels=1024)
    side = 16
    assert int(whole.is_image.sum()) == 16 and int(capped.is_image.sum()) * side**2 <= 1024
    again = preprocess("q", QUESTION, capped.images)
    assert torch.equal(again.input_ids, capped.input_ids)


@pytest.mark.parametrize(
    ("family", "token"), [("qwen3_vl", "<|image_pad|>"), ("mistral3", "[IMG]")]
)
def test_a_placeholder_in_the_question_is_rejected(folders, family, token):
    check_placeholders_are_rejected(preprocessor(folders / family), token)


@pytest.mark.parametrize("family", ["qwen3_vl", "mistral3"])
def test_a_folder_without_chat_template_is_rejected(folders, family, tmp_path):
    for path in (folders / family).iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    config = read_config(tmp_path)
    message = said_by(FAMILIES[family].make_preprocessor, tmp_path, config)
    assert message.startswith(f"{tmp_path} has no chat template; add the published")


def test_images_beyond_the_tower_of_pixtral_are_refused(folders, tmp_path):
    for path in (folders / "mistral3").iterdir():
        if path.name != "preprocessor_config.json":
            (tmp_path / path.name).symlink_to(path)
    settings = {"size": {"longest_edge": 80}, "patch_size": 8}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    said = said_by(FAMILIES["mistral3"].make_preprocessor, tmp_path, read_config(tmp_path))
    assert said.endswith("size has longest_edge 80, and vision_config.image_size is 64")


def test_ministral3_takes_no_sequences_with_scaled_queries(folders, tmp_path):
    folder = folders / "mistral3"
    recipe = write_recipe(tmp_path, folder, evaluate={"data": None})
    plan = make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))
    assert plan.config["text_config"]["max_position_embeddings"] == 16384
    for tokens in (1024, 1025):
        save_file({"input_ids": torch.full((1, tokens), 5)}, tmp_path / f"{tokens}")
    assert len(read_inputs(plan, tmp_path / "1024")[0]) == 1
    said = said_by(read_inputs, plan, tmp_path / "1025")
    assert said == "row 0 of input_ids has 1025 tokens, and the model has 1024 positions"
