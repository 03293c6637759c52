"""Reference Mistral 3: transformers' model with random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from references import TEXT, VOCAB, Question, image_cases, random_ids, randomize, write_folder

IMAGE_TOKEN, ROW_END, IMAGE_END = VOCAB - 1, VOCAB - 2, VOCAB - 3
PATCH, MERGE, LONGEST_EDGE = 8, 2, 64
LLM = TEXT | {
    "model_type": "mistral",
    "head_dim": 64,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 4096,
    "rope_theta": 1e9,
    "sliding_window": None,
}
TOWER = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "image_size": LONGEST_EDGE,
    "patch_size": PATCH,
}


class Mistral3:
    """Mistral 3 with random weights."""

    def __init__(self, seed: int) -> None:
        from transformers import Mistral3Config, Mistral3ForConditionalGeneration

        config = Mistral3Config(
            text_config=LLM,
            vision_config=TOWER,
            image_token_index=IMAGE_TOKEN,
            spatial_merge_size=MERGE,
            tie_word_embeddings=False,
            architectures=["Mistral3ForConditionalGeneration"],
        )
        self.model = randomize(Mistral3ForConditionalGeneration(config), seed)

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V]."""
        return self.model(
            input_ids=question.ids[None],
            pixel_values=question.pixel_values,
            image_sizes=question.image_sizes,
        ).logits[0]


def published_name(name: str) -> str:
    """Return the published name of a parameter of transformers' model."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def write_mistral3(folder: Path, seed: int) -> Mistral3:
    """Write a model folder in the published layout and return its reference model."""
    reference = Mistral3(seed)
    tensors = {published_name(name): t for name, t in reference.model.state_dict().items()}
    write_folder(folder, reference.model.config.to_dict(), tensors)
    return reference


def _question(generator: torch.Generator, words: int, *sizes: tuple[int, int]) -> Question:
    """Return `words` ids of text, then images of (height, width), each followed by text."""
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    parts = [random_ids(words, generator).clamp(max=IMAGE_END - 1)]
    if not sizes:
        return Question(parts[0])
    processor = PixtralImageProcessorPil(
        size={"longest_edge": LONGEST_EDGE}, patch_size=PATCH * MERGE
    )
    images = [
        torch.randint(0, 256, (*size, 3), generator=generator).numpy().astype(np.uint8)
        for size in sizes
    ]
    inputs = processor(images, return_tensors="pt")
    image_sizes = torch.as_tensor(inputs["image_sizes"])
    for height, width in (image_sizes // (PATCH * MERGE)).tolist():
        row = [*[IMAGE_TOKEN] * width, ROW_END]
        parts += [
            torch.tensor([*row * (height - 1), *row[:-1], IMAGE_END]),
            random_ids(4, generator).clamp(max=IMAGE_END - 1),
        ]
    return Question(
        ids=torch.cat(parts), pixel_values=inputs["pixel_values"], image_sizes=image_sizes
    )


def mistral3_cases(seed: int, _: Mistral3) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return image_cases(partial(_question, generator))
