"""Training data of the tiny models: tokenizers, and scenes as tensors.

Legend: N scenes, Q questions of a scene.
"""

import multiprocessing
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from nemo_vlm_ptq.data import scene_questions, scenes
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX
from nemo_vlm_ptq.families import FAMILIES, vila

QUESTIONS_PER_SCENE = 10  # at most
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PAD_ID = 2
IGNORE_INDEX = -100
SCENES_PER_TASK = 500  # of a worker process
QUESTION = "\n{question}" + PROMPT_SUFFIX


@dataclass(frozen=True)
class TrainingSetup:
    """Prompt, tokens and image size of one family.

    template: prompt after the image, including the answer.
    end_token: token that ends an answer.
    block_width: tokens of one question, padded.
    special_tokens: special tokens in addition to <s>, </s> and <pad>.
    has_inner_bos: whether <s> precedes the text after the image.
    image_size: side of the image in pixels.
    processor_folder: sub-folder of the image processor.
    """

    template: str
    end_token: str
    block_width: int
    special_tokens: tuple[str, ...] = ()
    has_inner_bos: bool = False
    image_size: int = scenes.IMAGE_SIZE
    processor_folder: str = ""


SETUPS = {
    "llava": TrainingSetup(
        template=QUESTION + " ASSISTANT: {answer}",
        end_token=EOS,
        block_width=34,
        special_tokens=("<image>",),
    ),
    "vila": TrainingSetup(
        template=QUESTION + " ASSISTANT: {answer}",
        end_token=EOS,
        block_width=34,
        image_size=72,
        processor_folder="vision_tower",
    ),
    "phi": TrainingSetup(
        template=QUESTION + "<|end|>\n<|assistant|>\n{answer}",
        end_token="<|end|>",
        block_width=38,
        special_tokens=("<|user|>", "<|end|>", "<|assistant|>"),
        has_inner_bos=True,
    ),
}


def make_tokenizer(name: str, config: dict[str, Any]) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the questions; it puts <s> before every text."""
    setup = SETUPS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    questions = scene_questions.questions("train", 3000).values()
    prefixes = {"llava": "USER: ", "vila": vila.VICUNA_PROMPT.partition("{image}")[0], "phi": ""}
    texts = [
        prefixes[name] + setup.template.format(question=q["question"], answer=q["answer"])
        for q in questions
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=FAMILIES[name].text_config(config).vocab_size,
        special_tokens=[BOS, EOS, PAD, *setup.special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def encode_scenes(ids: range, name: str, split: str, tokenizer: Tokenizer) -> tuple[Any, ...]:
    """Draw and tokenize scenes.

    Returns:
        Images [N,side,side,3]; question blocks [N,Q,width]; position of each answer in its block
        [N,Q]; labels [N,Q,2], the answer token and the end token.
    """
    setup = SETUPS[name]
    end_id = tokenizer.token_to_id(setup.end_token)
    images = np.zeros((len(ids), setup.image_size, setup.image_size, 3), np.uint8)
    blocks = np.full((len(ids), QUESTIONS_PER_SCENE, setup.block_width), PAD_ID, np.int16)
    starts = np.ones((len(ids), QUESTIONS_PER_SCENE), np.int16)
    labels = np.full((len(ids), QUESTIONS_PER_SCENE, 2), IGNORE_INDEX, np.int16)
    for row, index in enumerate(ids):
        image = scenes.draw(f"{split}-{index:06d}")
        images[row] = image.resize((setup.image_size, setup.image_size), Resampling.BICUBIC)
        for slot, q in enumerate(scene_questions.questions(split, 1, index).values()):
            text = setup.template.format(question=q["question"], answer=q["answer"])
            encoding = tokenizer.encode(text, add_special_tokens=setup.has_inner_bos)
            tokens = [*encoding.ids, end_id]
            blocks[row, slot, : len(tokens)] = tokens
            starts[row, slot] = len(tokens) - 2  # an answer is one token, followed by the end token
            labels[row, slot] = tokens[-2:]
    return images, blocks, starts, labels


def load_scenes(name: str, split: str, count: int, tokenizer: Any, device: str) -> list[Tensor]:
    """Encode the first scenes of a split in one process per core and copy them to the device."""
    ranges = [range(i, min(i + SCENES_PER_TASK, count)) for i in range(0, count, SCENES_PER_TASK)]
    encode = partial(encode_scenes, name=name, split=split, tokenizer=tokenizer)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        parts = pool.map(encode, ranges, chunksize=1)
    return [torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*parts, strict=True)]
