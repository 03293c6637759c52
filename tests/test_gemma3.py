"""Gemma 3: prompts and pixels, answers with windows and image attention, and configs refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from bad_models import said_by, write_recipe
from processors import write_gemma3
from reference_gemma3 import CONFIG, IMAGE_TOKEN, SIDE, TOKENS, Gemma3
from test_family_prompts import (
    ANSWER,
    QUESTION,
    check_placeholders_are_rejected,
    check_sample,
    random_image,
)
from transformers import AutoTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from nemo_vlm_ptq.checkpoints.model_config import merge_config
from nemo_vlm_ptq.families import gemma3
from nemo_vlm_ptq.megatron.forward import collate
from nemo_vlm_ptq.megatron.rotary import apply_sliding_window
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel

MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    write_gemma3(folder)
    return folder


@pytest.mark.parametrize("size", [(90, 40), (32, 32)])
def test_prompts_and_pixels_are_those_of_the_published_processor(folder, size):
    preprocess = gemma3.make_preprocessor(folder, CONFIG)
    sample = preprocess("q", QUESTION, random_image(*size))
    image_processor = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.image_token, tokenizer.image_token_id = "<image_soft_token>", IMAGE_TOKEN
    tokenizer.boi_token, tokenizer.eoi_token = MARKS["boi_token"], MARKS["eoi_token"]
    processor = Gemma3Processor(image_processor, tokenizer, image_seq_length=TOKENS)
    rendered = f"<s><user><start_of_image>{QUESTION}\n<model>\n"
    expected = processor(
        images=random_image(*size), text=rendered, add_special_tokens=False, return_tensors="pt"
    )
    assert torch.equal(sample.images.pixel_values, expected["pixel_values"])
    check_sample(sample, expected["input_ids"][0].tolist(), IMAGE_TOKEN)
    again = preprocess("q", QUESTION, sample.images.to_meta(), ANSWER)
    assert again.input_ids[: len(sample.input_ids)].tolist() == sample.input_ids.tolist()


def test_a_prompt_without_an_image_has_no_marks(folder):
    preprocess = gemma3.make_preprocessor(folder, CONFIG)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"<s><user>{QUESTION}\n<model>\n", add_special_tokens=False)["input_ids"]
    check_sample(preprocess("q", QUESTION), ids, IMAGE_TOKEN, has_image=False)
    check_placeholders_are_rejected(preprocess, "<image_soft_token>")


def test_angles_of_both_kinds_of_layers_are_on_the_device_of_the_model():
    rotary = SimpleNamespace(inv_freq=torch.ones(32))  # on the CPU, as megatron-core makes it
    model = SimpleNamespace(rotary_pos_emb=rotary, decoder=SimpleNamespace(layers=[]))
    decoder = gemma3.FAMILY.decoder(CONFIG)
    apply_sliding_window(model, decoder, decoder.sliding_window, torch.device("meta"))
    assert {angles.device.type for angles in model.rotary_pos_emb(7)} == {"meta"}


def test_pan_and_scan_is_refused(tmp_path):
    write_gemma3(tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_pan_and_scan": True}))
    said = said_by(gemma3.make_preprocessor, tmp_path / "model", CONFIG)
    assert said.endswith("do_pan_and_scan is true; only false is supported")


def test_answers_are_those_of_transformers(tmp_path, folder):
    """A batch is padded, and answers grow beyond the window."""
    recipe = write_recipe(tmp_path, folder, evaluate={"data": None})
    plan = make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))
    checkpoint = read_source(plan.tensors)
    vision = {name: checkpoint.plain[name] for name in plan.vision_names}
    model = ReferenceModel(
        plan.family, plan.config, checkpoint, vision, torch.float32, torch.device("cpu")
    )
    model.eos_token_ids = set()
    preprocess = gemma3.make_preprocessor(folder, plan.config)
    samples = [preprocess("a", QUESTION, random_image(90, 40)), preprocess("b", "Why?")]
    features = [model.encode_images(samples[0].images), None]
    found = model.generate(samples, features, 8)
    for sample, answer in zip(samples, found, strict=True):
        ids = sample.input_ids[None]
        pixels = {} if sample.images is None else {"pixel_values": sample.images.pixel_values}
        expected = Gemma3(0).model.generate(
            input_ids=ids, token_type_ids=sample.is_image[None].long(), **pixels,
            max_new_tokens=8, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert answer == expected[0, ids.shape[1] :].tolist()


def test_tokens_of_an_image_attend_to_each_other_and_not_to_those_of_the_next(folder):
    from nemo_vlm_ptq.megatron.forward import _bidirectional_mask
    from nemo_vlm_ptq.reference.attention_masks import image_masks

    is_image = torch.tensor([True, True, False, True, True, True, False, False])
    sample = SimpleNamespace(
        id="q", input_ids=torch.arange(8), is_image=is_image, images=None, positions=None
    )
    keep = ~_bidirectional_mask(collate([sample]))[0, 0]
    place = torch.arange(8)
    image = torch.tensor([1, 1, 0, 2, 2, 2, 0, 0])
    same = (image[:, None] == image) & is_image
    assert torch.equal(keep, (place[:, None] >= place) | same)
    masks = image_masks(torch.ones(1, 8), is_image[None], 2)
    assert torch.equal(masks["full_attention"][0, 0], keep)
    assert torch.equal(masks["sliding_attention"][0, 0], keep & (place[:, None] - place < 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"final_logit_softcapping": 30.0}},
         "text_config.final_logit_softcapping is 30.0; only None is supported"),
        ({"text_config": {"attn_logit_softcapping": 50.0}},
         "text_config.attn_logit_softcapping is 50.0; only None is supported"),
        ({"text_config": {"hidden_activation": "gelu"}},
         "text_config.hidden_activation is 'gelu'; only 'gelu_pytorch_tanh' is supported"),
        ({"text_config": {"attention_bias": True}},
         "text_config.attention_bias is True; only False is supported"),
        ({"text_config": {"use_bidirectional_attention": True}},
         "text_config.use_bidirectional_attention is True; only False is supported"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}},
         "rope type of full_attention is 'yarn'; supported: default, linear"),
        ({"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 0}}},
         "factor of full_attention must be a positive number, got 0"),
        ({"text_config": {"layer_types": ["full_attention", "chunked_attention"]}},
         "kinds in layer_types is ['chunked_attention', 'full_attention', 'sliding_attention']"),
        ({"text_config": {"sliding_window": 0}},
         "text_config.sliding_window must be a positive integer, got 0"),
        ({"text_config": {"query_pre_attn_scalar": -1}},
         "text_config.query_pre_attn_scalar must be a positive number, got -1"),
        ({"mm_tokens_per_image": 5}, "mm_tokens_per_image must be the square of a divisor of 4"),
        ({"mm_tokens_per_image": 9}, "mm_tokens_per_image must be the square of a divisor of 4"),
        ({"vision_config": {"vision_use_head": True}},
         "vision_config.vision_use_head is True; only False is supported"),
        ({"boi_token_index": -1}, "boi_token_index must be the id of a token, got -1"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_supported_is_refused(change, message):
    said = said_by(gemma3.decoder, merge_config(CONFIG, change))
    assert said.startswith("gemma3: ") and message in said
