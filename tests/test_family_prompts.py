"""Prompts of VILA, Phi-3-vision and LLaVA-NeXT, id by id, and the pictures beside them."""

import json

import numpy as np
import pytest
import torch
from bad_models import said_by
from PIL import Image
from processors import PHI_MARKS, llava_next_images, phi_images, vila_images
from reference_llava_next import CLIP as NEXT_CLIP
from reference_llava_next import GRIDS, IMAGE, TEXTS
from reference_phi import PUBLISHED, image_tokens
from reference_phi import SIDE as CROP
from reference_vila import LLAMA, PROJECTOR, SIGLIP
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny_tokenizers import write_llama, write_llama_3

from nemo_vlm_ptq.families import llava_next, phi, vila

QUESTION, ANSWER = "What {color} is it?", "red"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)
LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and "
    "vision assistant. You are able to understand the visual content that the user provides, and "
    "assist the user with a variety of tasks using natural language.<|end_of_text|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\n{}<|end_of_text|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_3_MARKS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
VILA_TOKENS = 16
PROMPTS = {
    "llama": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    "USER: <image>\n{} ASSISTANT:",
    "mistral": "[INST] <image>\n{} [/INST]",
}


def picture(width, height):
    dice = np.random.default_rng(0)
    return Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def spell(tokens, text):
    """Ids of a text without those that a tokenizer puts around it."""
    return tokens.encode(text, add_special_tokens=False).ids


def check(sample, ids, mark, looks=True):
    """A sample has these ids, image tokens where they are `mark`, and a picture if it looks."""
    assert sample.input_ids.tolist() == ids
    assert sample.is_image.tolist() == [id == mark for id in ids]
    assert (sample.pixels is not None) is looks


def refuses(prepare, mark):
    """Data of others brings its own marks of images: they would be one too many, or alone."""
    said = "question 'q' has marks of images in its own text or answer ({} in its prompt, with "
    question = f"{mark}\n{QUESTION}"
    assert said_by(prepare, "q", question).startswith(said.format(1) + "0 images)")
    looking = said_by(prepare, "q", question, picture(50, 30))
    assert looking.startswith(said.format(2) + "1 images)")


def vila_preparer(folder):
    vila_images(folder)
    parts = zip(vila.SUBFOLDERS, (LLAMA, SIGLIP, PROJECTOR), strict=True)
    for part, config in parts:
        write(folder / part, "config.json", config)
    return vila.make_preprocessor(folder, vila.complete_config(folder, {"llm_cfg": LLAMA}))


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_vila_splits_its_prompt_at_the_image_and_begins_once(tmp_path, kind):
    tokens = write_llama(tmp_path / "llm", kind=kind)
    prepare = vila_preparer(tmp_path)
    before, after = (spell(tokens, part) for part in VICUNA.format(QUESTION).split("<image>"))
    image = [vila.IMAGE_ID] * VILA_TOKENS
    sample = prepare("q", QUESTION, picture(50, 30))
    check(sample, [1, *before, *image, *after], vila.IMAGE_ID)
    again = prepare("q", QUESTION, sample.pixels, ANSWER)
    ids = spell(tokens, VICUNA.format(QUESTION).split("<image>")[1] + " " + ANSWER)
    check(again, [1, *before, *image, *ids], vila.IMAGE_ID)
    words = spell(tokens, VICUNA.replace("<image>\n", "").format(QUESTION))
    check(prepare("q", QUESTION), [1, *words], vila.IMAGE_ID, looks=False)
    refuses(prepare, "<image>")


def test_vila_reads_a_tokenizer_that_is_sentencepiece_alone(tmp_path):
    (tmp_path / "llm").mkdir()
    words = [VICUNA.format(f"{QUESTION} {index}") for index in range(100)]
    with (tmp_path / "llm" / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    write(tmp_path / "llm", "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    model = SentencePieceProcessor(model_file=str(tmp_path / "llm" / "tokenizer.model"))
    before, after = (model.encode(part) for part in VICUNA.format(QUESTION).split("<image>"))
    ids = [1, *before, *[vila.IMAGE_ID] * VILA_TOKENS, *after]
    check(vila_preparer(tmp_path)("q", QUESTION, picture(50, 30)), ids, vila.IMAGE_ID)


def test_vila_asks_in_the_words_of_llama_3_where_its_tokenizer_knows_them(tmp_path):
    tokens = write_llama_3(tmp_path / "llm", LLAMA_3_MARKS)
    prepare = vila_preparer(tmp_path)
    before, after = (spell(tokens, part) for part in LLAMA_3.format(QUESTION).split("<image>"))
    ids = [*before, *[vila.IMAGE_ID] * VILA_TOKENS, *after]
    assert ids.count(tokens.token_to_id(LLAMA_3_MARKS[0])) == 1
    check(prepare("q", QUESTION, picture(50, 30)), ids, vila.IMAGE_ID)
    answered = prepare("q", QUESTION, picture(50, 30), ANSWER)
    check(answered, ids + spell(tokens, ANSWER), vila.IMAGE_ID)


def test_vila_squeezes_a_picture_into_a_square(tmp_path):
    write_llama(tmp_path / "llm")
    views = vila_preparer(tmp_path)("q", QUESTION, picture(50, 30)).pixels.pixel_values
    small = picture(50, 30).resize((28, 28), Image.Resampling.BICUBIC)
    expected = np.asarray(small).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(views[0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_phi_begins_again_after_its_image(tmp_path, kind):
    tokens = write_llama(tmp_path, PHI_MARKS, kind)
    write(tmp_path, "config.json", PUBLISHED)
    phi_images(tmp_path, 4)
    prepare = phi.make_preprocessor(tmp_path, PUBLISHED)
    user, space, line = (tokens.token_to_id(token) for token in ("<|user|>", "▁", "<0x0A>"))
    start = [1, user, space, line]
    asked = f"\n{QUESTION}<|end|>\n<|assistant|>\n"
    sample = prepare("q", QUESTION, picture(3 * CROP, CROP + 5))
    image = [-1] * image_tokens(1, 2)
    check(sample, [*start, *image, 1, *spell(tokens, asked)], -1)
    assert sample.pixels.image_sizes.tolist() == [[CROP, 2 * CROP]]
    assert sample.pixels.pixel_values.shape == (1, 5, 3, CROP, CROP)
    answered = prepare("q", QUESTION, sample.pixels, ANSWER)
    check(answered, [*start, *image, 1, *spell(tokens, asked + ANSWER)], -1)
    check(prepare("q", QUESTION), [1, *spell(tokens, "<|user|>" + asked)], -1, looks=False)
    refuses(prepare, "<|image_1|>")


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("size", [(50, 70), (90, 20), (32, 32)])
def test_llava_next_asks_as_its_processor_does(tmp_path, text, size):
    from transformers import AutoTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    write_llama(tmp_path, ["<image>"])
    llava_next_images(tmp_path)
    config = LlavaNextConfig(
        text_config=TEXTS[text],
        vision_config=NEXT_CLIP,
        image_grid_pinpoints=GRIDS,
        image_token_index=IMAGE,
    ).to_dict()
    write(tmp_path, "config.json", config)
    prepare = llava_next.make_preprocessor(tmp_path, config)
    refuses(prepare, "<image>")
    sample = prepare("q", QUESTION, picture(*size))
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        patch_size=NEXT_CLIP["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    prompt = PROMPTS[text].format(QUESTION)
    expected = processor(text=prompt, images=picture(*size), return_tensors="pt")
    check(sample, expected["input_ids"][0].tolist(), IMAGE)
    assert torch.equal(sample.pixels.pixel_values, expected["pixel_values"])
    assert torch.equal(sample.pixels.image_sizes, expected["image_sizes"])
