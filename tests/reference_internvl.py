"""Reference InternVL models: transformers' model with random weights in the published layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from references import TEXT, VOCAB, Question, image_cases, random_ids, randomize, write_folder

IMAGE_TOKEN, START, END = VOCAB - 1, VOCAB - 2, VOCAB - 3
SIDE, MOST_TILES, TILE_TOKENS = 32, 4, 4
TOWER = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": [SIDE, SIDE],
    "patch_size": [8, 8],
    "attention_bias": True,
}
LARGE_TOWER = {"attention_bias": False, "norm_type": "rms_norm", "use_qk_norm": True}
TEXTS = {
    "qwen2": {
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "qwen3": {"max_position_embeddings": 4096, "rope_theta": 1e6, "head_dim": 64},
}


class InternVL:
    """An InternVL with random weights.

    tied: whether the head is the embedding; by default with the decoder of Qwen3.
    large: whether the tower is like that of the models of 38B and above.
    """

    def __init__(
        self, seed: int, kind: str, *, tied: bool | None = None, large: bool = False
    ) -> None:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        self.tied = kind == "qwen3" if tied is None else tied
        config = InternVLConfig(
            text_config=TEXT | TEXTS[kind] | {"model_type": kind},
            vision_config=TOWER | (LARGE_TOWER if large else {}),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=TILE_TOKENS,
            tie_word_embeddings=self.tied,
            architectures=["InternVLForConditionalGeneration"],
        )
        torch.manual_seed(seed)
        self.model = randomize(InternVLForConditionalGeneration(config), seed)
        if self.tied:
            self.model.tie_weights()

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V]."""
        inputs = {"input_ids": question.ids[None], "pixel_values": question.pixel_values}
        return self.model(**inputs).logits[0]


def published_name(name: str) -> str:
    """Return the name on disk of a parameter of transformers' model."""
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.").removeprefix("model.")


def write_internvl(folder: Path, seed: int, kind: str, **options: bool) -> InternVL:
    """Write a model folder in the published layout and return its reference model."""
    reference = InternVL(seed, kind, **options)
    tensors = {published_name(name): one for name, one in reference.model.state_dict().items()}
    if reference.tied:
        del tensors["language_model.lm_head.weight"]
    write_folder(folder, reference.model.config.to_dict(), tensors)
    return reference


def _question(generator: torch.Generator, words: int, *sizes: tuple[int, int]) -> Question:
    """Return `words` ids of text, then images of (height, width), each followed by text."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    parts = [random_ids(words, generator).clamp(max=END - 1)]
    if not sizes:
        return Question(parts[0])
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_patches=MOST_TILES, crop_to_patches=True
    )
    images = [
        torch.randint(0, 256, (*size, 3), generator=generator).numpy().astype(np.uint8)
        for size in sizes
    ]
    inputs = processor(images, return_tensors="pt")
    for tiles in inputs["num_patches"].tolist():
        image = torch.full((tiles * TILE_TOKENS,), IMAGE_TOKEN)
        text = random_ids(4, generator).clamp(max=END - 1)
        parts += [torch.tensor([START]), image, torch.tensor([END]), text]
    return Question(ids=torch.cat(parts), pixel_values=inputs["pixel_values"])


TILE_SIZES = ((40, 90), (90, 20), (20, 22), (20, 22), (61, 64))


def internvl_cases(seed: int, _: InternVL) -> dict[str, list[Question]]:
    """Return case -> questions of one batch; images have 1, 3 or 5 tiles."""
    generator = torch.Generator().manual_seed(seed)
    return image_cases(partial(_question, generator), TILE_SIZES)
