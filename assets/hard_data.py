"""Training data of tiny-qwen3-vl: its tokenizer, and hard scenes as tensors.

Legend: N scenes, Q questions of a scene, W tokens of a question's block.
"""

import math
import mmap
import multiprocessing
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from nemo_vlm_ptq.data import hard_questions, hard_scenes, scenes
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PAD_ID, END_ID, START_ID, STOP_ID, IMAGE_ID = 0, 2, 3, 4, 6
# How Qwen's tokenizer cuts a text before it merges bytes.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SINGLES, PAIRS = 12, 3  # questions of a scene at most, about one image and about two
SLOTS = SINGLES + PAIRS
ANSWER_TOKENS = 5  # four letters and the end
WIDTH = 39
IGNORE_INDEX = -100
SCENES_PER_TASK = 200  # of a worker process
BEFORE = "<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"


class Data(NamedTuple):
    """Scenes; the second image of scene n is that of n + 1.

    images: [N+1,side,side,3] uint8.
    blocks: [N,Q,W] int16, a question with its answer.
    starts: [N,Q] int16, place of the answer in the block.
    labels: [N,Q,ANSWER_TOKENS] int16, IGNORE_INDEX after the end.
    types: [N,Q] int16, index in `question_types`; IGNORE_INDEX where there is no question.
    """

    images: Any
    blocks: Any
    starts: Any
    labels: Any
    types: Any


def question_types() -> list[str]:
    """Return the types of questions."""
    entries = hard_questions.questions("train", 200).values()
    return sorted({entry["types"]["detailed"] for entry in entries})


def make_tokenizer(vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the questions; letters on signs stay single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["user\n", "assistant\n"] * 3000
    for entry in hard_questions.questions("train", 3000).values():
        texts.append(entry["question"] + PROMPT_SUFFIX)
        if entry["types"]["detailed"] != "readText":
            texts.append(entry["answer"])
    for word in [*scenes.COLORS, *hard_scenes.SHAPES, *hard_questions.NUMBERS]:
        texts += [word] * 300
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _shared(shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Return an array that worker processes write to."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    return np.frombuffer(mmap.mmap(-1, size), kind).reshape(shape)


def _allocate(count: int) -> Data:
    """Return the empty tensors of `count` scenes."""
    side = hard_scenes.IMAGE_SIZE
    data = Data(
        images=_shared((count + 1, side, side, 3), np.uint8),
        blocks=_shared((count, SLOTS, WIDTH), np.int16),
        starts=_shared((count, SLOTS), np.int16),
        labels=_shared((count, SLOTS, ANSWER_TOKENS), np.int16),
        types=_shared((count, SLOTS), np.int16),
    )
    data.starts[:], data.labels[:], data.types[:] = 1, IGNORE_INDEX, IGNORE_INDEX
    return data


_work: Any = None  # (data, split, tokenizer, types) of a worker process


def _encode(indices: range) -> None:
    """Draw and tokenize scenes."""
    data, split, tokenizer, types = _work
    for index in indices:
        image_id = f"{hard_scenes.PREFIX}{split}-{index:06d}"
        data.images[index] = np.asarray(hard_scenes.draw(image_id))
        if index == len(data.blocks):  # only the second image of the last scene
            return
        single = pair = 0
        for entry in hard_questions.questions(split, 1, index).values():
            if isinstance(entry["imageId"], list):
                slot, pair = SINGLES + pair, pair + 1
            else:
                slot, single = single, single + 1
            prompt = tokenizer.encode(entry["question"] + PROMPT_SUFFIX + AFTER).ids
            answer = [*tokenizer.encode(entry["answer"]).ids, END_ID]
            data.blocks[index, slot, : len(prompt) + len(answer)] = prompt + answer
            data.starts[index, slot] = len(prompt)
            data.labels[index, slot, : len(answer)] = answer
            data.types[index, slot] = types.index(entry["types"]["detailed"])


def load_scenes(
    split: str, count: int, tokenizer: Tokenizer, types: list[str], device: str
) -> Data:
    """Encode the first scenes of a split in one process per core and copy them to the device."""
    global _work
    data = _allocate(count)
    _work = data, split, tokenizer, types
    total = count + 1
    ranges = [range(i, min(i + SCENES_PER_TASK, total)) for i in range(0, total, SCENES_PER_TASK)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for _ in pool.imap_unordered(_encode, ranges):
            pass
    return Data(*(torch.from_numpy(part).to(device) for part in data))


def answer_places(starts: Tensor) -> Tensor:
    """Return the places [...,ANSWER_TOKENS] whose logits predict the answers."""
    offsets = torch.arange(-1, ANSWER_TOKENS - 1, device=starts.device)
    return (starts.long()[..., None] + offsets).clamp(max=WIDTH - 1)
