"""Reference LLaVA-NeXT: transformers' model with random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import published_name
from references import TEXT, VOCAB, Question, image_cases, random_ids, randomize, write_folder

SIDE, IMAGE_TOKEN = 32, VOCAB - 1
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
    """LLaVA-NeXT with random weights."""

    def __init__(self, seed: int, text: str) -> None:
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

        config = LlavaNextConfig(
            text_config=TEXTS[text],
            vision_config=CLIP,
            image_grid_pinpoints=GRIDS,
            image_token_index=IMAGE_TOKEN,
            tie_word_embeddings=False,
            architectures=["LlavaNextForConditionalGeneration"],
        )
        torch.manual_seed(seed)  # transformers initializes the newline at random
        self.model = randomize(LlavaNextForConditionalGeneration(config), seed)

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V]."""
        return self.model(
            input_ids=question.ids[None],
            pixel_values=question.pixel_values,
            image_sizes=question.image_sizes,
        ).logits[0]

    def process(self, images: list) -> Any:
        """Return the model inputs of images."""
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil,
        )

        square = {"height": SIDE, "width": SIDE}
        processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=GRIDS
        )
        return processor(images, return_tensors="pt")

    @torch.no_grad()
    def token_counts(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> list[int]:
        """Return the number of tokens of each image."""
        features = self.model.get_image_features(pixel_values, image_sizes).pooler_output
        return [len(one) for one in features]


def write_llava_next(folder: Path, seed: int, text: str = "mistral") -> LlavaNext:
    """Write a model folder in the published layout and return its reference model."""
    reference = LlavaNext(seed, text)
    tensors = {published_name(name): t for name, t in reference.model.state_dict().items()}
    assert "image_newline" in tensors
    write_folder(folder, reference.model.config.to_dict(), tensors)
    return reference


def _question(
    model: LlavaNext, generator: torch.Generator, words: int, *sizes: tuple[int, int]
) -> Question:
    """Return `words` ids of text, then images of (height, width), each followed by text."""
    parts = [random_ids(words, generator)]
    if not sizes:
        return Question(parts[0])
    images = [
        torch.randint(0, 256, (*size, 3), generator=generator).numpy().astype(np.uint8)
        for size in sizes
    ]
    inputs = model.process(images)
    for count in model.token_counts(inputs["pixel_values"], inputs["image_sizes"]):
        parts += [torch.full((count,), IMAGE_TOKEN), random_ids(4, generator)]
    return Question(
        ids=torch.cat(parts),
        pixel_values=inputs["pixel_values"],
        image_sizes=inputs["image_sizes"],
    )


def llava_next_cases(seed: int, model: LlavaNext) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return image_cases(partial(_question, model, generator))
