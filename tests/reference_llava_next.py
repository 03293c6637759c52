"""A tiny LLaVA-NeXT as it is published: transformers' own model with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from models import published
from references import TEXT, VOCAB, Question, random_ids, shake, write_folder

SIDE, IMAGE = 32, VOCAB - 1
GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
    "projection_dim": 32,
}
TEXTS = {
    "llama": TEXT | {"model_type": "llama", "max_position_embeddings": 4096},
    "mistral": TEXT
    | {
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}


class LlavaNext:
    """What LLaVA-NeXT says, on random weights."""

    def __init__(self, seed: int, text: str) -> None:
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

        config = LlavaNextConfig(
            text_config=TEXTS[text],
            vision_config=CLIP,
            image_grid_pinpoints=GRIDS,
            image_token_index=IMAGE,
            tie_word_embeddings=False,
            architectures=["LlavaNextForConditionalGeneration"],
        )
        torch.manual_seed(seed)  # transformers draws the newline when it builds the model
        self.model = shake(LlavaNextForConditionalGeneration(config), seed)

    @torch.no_grad()
    def ask(self, question: Question) -> torch.Tensor:
        """Logits [S,V]."""
        return self.model(
            input_ids=question.ids[None],
            pixel_values=question.pixel_values,
            image_sizes=question.image_sizes,
        ).logits[0]

    @torch.no_grad()
    def image_tokens(self, views: torch.Tensor, sizes: torch.Tensor) -> list[int]:
        """Tokens of each image."""
        features = self.model.get_image_features(views, sizes).pooler_output
        return [len(one) for one in features]


def write_llava_next(folder: Path, seed: int, text: str = "mistral") -> LlavaNext:
    """A model folder as it is published, and its reference."""
    reference = LlavaNext(seed, text)
    tensors = {published(name): t for name, t in reference.model.state_dict().items()}
    assert "image_newline" in tensors
    write_folder(folder, reference.model.config.to_dict(), tensors)
    return reference


def _question(model: LlavaNext, dice: torch.Generator, words: int, *sizes: tuple[int, int]):
    """Words, then pictures of so many pixels in height and width, with words after each."""
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    parts = [random_ids(words, dice)]
    if not sizes:
        return Question(parts[0])
    square = {"height": SIDE, "width": SIDE}
    process = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=GRIDS
    )
    pictures = [
        torch.randint(0, 256, (*size, 3), generator=dice).numpy().astype(np.uint8) for size in sizes
    ]
    made = process(pictures, return_tensors="pt")
    for count in model.image_tokens(made["pixel_values"], made["image_sizes"]):
        parts += [torch.full((count,), IMAGE), random_ids(4, dice)]
    return Question(torch.cat(parts), made["pixel_values"], made["image_sizes"])


def llava_next_cases(seed: int, model: LlavaNext) -> dict[str, list[Question]]:
    """Case -> questions that are asked as one batch."""
    dice = torch.Generator().manual_seed(seed)
    return {
        "images": [
            _question(model, dice, 5, (50, 70)),
            _question(model, dice, 5, (20, 90), (61, 24)),
        ],
        "text": [_question(model, dice, 33), _question(model, dice, 33)],
        "padded": [
            _question(model, dice, 9, (30, 41)),
            _question(model, dice, 12),
            _question(model, dice, 40, (64, 64)),
        ],
    }
