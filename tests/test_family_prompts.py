"""Input ids of the prompts of VILA, Phi-3-vision and LLaVA-NeXT, and their pixel values."""

import json

import numpy as np
import pytest
import torch
from bad_models import said_by
from PIL import Image
from processors import (
    PHI_SPECIAL_TOKENS,
    write_llava_next_processor,
    write_phi_processor,
    write_vila_processor,
)
from reference_llava_next import CLIP, GRIDS, IMAGE_TOKEN, TEXTS
from reference_phi import PUBLISHED, token_count
from reference_phi import SIDE as CROP_SIDE
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
LLAMA_3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
VILA_TOKENS = 16
PROMPTS = {
    "llama": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    "USER: <image>\n{} ASSISTANT:",
    "mistral": "[INST] <image>\n{} [/INST]",
}


def random_image(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_json(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def tokenize(tokenizer, text):
    """Return the ids of a text without special tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def check_sample(sample, ids, image_token, has_image=True):
    """Compare a sample with ids; `image_token` stands at image tokens."""
    assert sample.input_ids.tolist() == ids
    assert sample.is_image.tolist() == [id == image_token for id in ids]
    assert (sample.images is not None) is has_image


def check_placeholders_are_rejected(preprocess, placeholder):
    """Require an error for a question with an image placeholder in its text."""
    question = f"{placeholder}\n{QUESTION}"
    message = (
        "question 'q': its text and answer must not hold image placeholders (got {} in the prompt, "
        "expected {});"
    )
    assert said_by(preprocess, "q", question).startswith(message.format(1, 0))
    with_image = said_by(preprocess, "q", question, random_image(50, 30))
    assert with_image.startswith(message.format(2, 1))


def vila_preprocessor(folder):
    write_vila_processor(folder)
    parts = zip(vila.SUBFOLDERS, (LLAMA, SIGLIP, PROJECTOR), strict=True)
    for part, config in parts:
        write_json(folder / part, "config.json", config)
    return vila.make_preprocessor(folder, vila.complete_config(folder, {"llm_cfg": LLAMA}))


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_vila_tokenizes_the_texts_around_the_image_separately(tmp_path, tokenizer_class):
    tokenizer = write_llama(tmp_path / "llm", tokenizer_class=tokenizer_class)
    preprocess = vila_preprocessor(tmp_path)
    before, after = (tokenize(tokenizer, part) for part in VICUNA.format(QUESTION).split("<image>"))
    image = [vila.IMAGE_TOKEN_INDEX] * VILA_TOKENS
    sample = preprocess("q", QUESTION, random_image(50, 30))
    check_sample(sample, [1, *before, *image, *after], vila.IMAGE_TOKEN_INDEX)
    again = preprocess("q", QUESTION, sample.images, ANSWER)
    ids = tokenize(tokenizer, VICUNA.format(QUESTION).split("<image>")[1] + " " + ANSWER)
    check_sample(again, [1, *before, *image, *ids], vila.IMAGE_TOKEN_INDEX)
    text_ids = tokenize(tokenizer, VICUNA.replace("<image>\n", "").format(QUESTION))
    check_sample(preprocess("q", QUESTION), [1, *text_ids], vila.IMAGE_TOKEN_INDEX, has_image=False)
    check_placeholders_are_rejected(preprocess, "<image>")


def test_vila_loads_a_sentencepiece_tokenizer(tmp_path):
    (tmp_path / "llm").mkdir()
    sentences = [VICUNA.format(f"{QUESTION} {index}") for index in range(100)]
    with (tmp_path / "llm" / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    write_json(tmp_path / "llm", "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    model = SentencePieceProcessor(model_file=str(tmp_path / "llm" / "tokenizer.model"))
    before, after = (model.encode(part) for part in VICUNA.format(QUESTION).split("<image>"))
    ids = [1, *before, *[vila.IMAGE_TOKEN_INDEX] * VILA_TOKENS, *after]
    sample = vila_preprocessor(tmp_path)("q", QUESTION, random_image(50, 30))
    check_sample(sample, ids, vila.IMAGE_TOKEN_INDEX)


def test_vila_uses_the_llama_3_prompt_with_a_llama_3_tokenizer(tmp_path):
    tokenizer = write_llama_3(tmp_path / "llm", LLAMA_3_SPECIAL_TOKENS)
    preprocess = vila_preprocessor(tmp_path)
    before, after = (
        tokenize(tokenizer, part) for part in LLAMA_3.format(QUESTION).split("<image>")
    )
    ids = [*before, *[vila.IMAGE_TOKEN_INDEX] * VILA_TOKENS, *after]
    assert ids.count(tokenizer.token_to_id(LLAMA_3_SPECIAL_TOKENS[0])) == 1
    check_sample(preprocess("q", QUESTION, random_image(50, 30)), ids, vila.IMAGE_TOKEN_INDEX)
    answered = preprocess("q", QUESTION, random_image(50, 30), ANSWER)
    check_sample(answered, ids + tokenize(tokenizer, ANSWER), vila.IMAGE_TOKEN_INDEX)


def test_vila_resizes_an_image_to_a_square(tmp_path):
    write_llama(tmp_path / "llm")
    views = vila_preprocessor(tmp_path)("q", QUESTION, random_image(50, 30)).images.pixel_values
    small = random_image(50, 30).resize((28, 28), Image.Resampling.BICUBIC)
    expected = np.asarray(small).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(views[0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_phi_repeats_bos_after_the_image(tmp_path, tokenizer_class):
    tokenizer = write_llama(tmp_path, PHI_SPECIAL_TOKENS, tokenizer_class)
    write_json(tmp_path, "config.json", PUBLISHED)
    write_phi_processor(tmp_path, 4)
    preprocess = phi.make_preprocessor(tmp_path, PUBLISHED)
    user, space, line = (tokenizer.token_to_id(token) for token in ("<|user|>", "▁", "<0x0A>"))
    start = [1, user, space, line]
    asked = f"\n{QUESTION}<|end|>\n<|assistant|>\n"
    sample = preprocess("q", QUESTION, random_image(3 * CROP_SIDE, CROP_SIDE + 5))
    image = [-1] * token_count(1, 2)
    check_sample(sample, [*start, *image, 1, *tokenize(tokenizer, asked)], -1)
    assert sample.images.image_sizes.tolist() == [[CROP_SIDE, 2 * CROP_SIDE]]
    assert sample.images.pixel_values.shape == (1, 5, 3, CROP_SIDE, CROP_SIDE)
    answered = preprocess("q", QUESTION, sample.images, ANSWER)
    check_sample(answered, [*start, *image, 1, *tokenize(tokenizer, asked + ANSWER)], -1)
    text_ids = [1, *tokenize(tokenizer, "<|user|>" + asked)]
    check_sample(preprocess("q", QUESTION), text_ids, -1, has_image=False)
    check_placeholders_are_rejected(preprocess, "<|image_1|>")


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("size", [(50, 70), (90, 20), (32, 32)])
def test_llava_next_inputs_match_the_published_processor(tmp_path, text, size):
    from transformers import AutoTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    write_llama(tmp_path, ["<image>"])
    write_llava_next_processor(tmp_path)
    config = LlavaNextConfig(
        text_config=TEXTS[text],
        vision_config=CLIP,
        image_grid_pinpoints=GRIDS,
        image_token_index=IMAGE_TOKEN,
    ).to_dict()
    write_json(tmp_path, "config.json", config)
    preprocess = llava_next.make_preprocessor(tmp_path, config)
    check_placeholders_are_rejected(preprocess, "<image>")
    sample = preprocess("q", QUESTION, random_image(*size))
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        patch_size=CLIP["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    prompt = PROMPTS[text].format(QUESTION)
    expected = processor(text=prompt, images=random_image(*size), return_tensors="pt")
    check_sample(sample, expected["input_ids"][0].tolist(), IMAGE_TOKEN)
    assert torch.equal(sample.images.pixel_values, expected["pixel_values"])
    assert torch.equal(sample.images.image_sizes, expected["image_sizes"])
