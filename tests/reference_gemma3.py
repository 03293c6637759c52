"""Reference Gemma 3: transformers' model with random weights in the published layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from references import TEXT, VOCAB, Question, image_cases, random_ids, randomize, write_folder

IMAGE_TOKEN, START, END = VOCAB - 1, VOCAB - 2, VOCAB - 3
SIDE, TOKENS = 32, 4
LLM = TEXT | {
    "head_dim": 64,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 4096,
    "query_pre_attn_scalar": 24,  # not head_dim
    "sliding_window": 5,  # tokens: longer than an image, shorter than the questions
    "sliding_window_pattern": 2,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "tie_word_embeddings": True,
}
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
    "vision_use_head": False,
}
CONFIG = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": LLM | {"model_type": "gemma3_text"},
    "vision_config": TOWER,
    "image_token_index": IMAGE_TOKEN,
    "boi_token_index": START,
    "eoi_token_index": END,
    "mm_tokens_per_image": TOKENS,
}


class Gemma3:
    """Gemma 3 with random weights."""

    def __init__(self, seed: int) -> None:
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        model = Gemma3ForConditionalGeneration(Gemma3Config.from_dict(CONFIG))
        self.model = randomize(model, seed)
        self.model.tie_weights()

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V]."""
        ids = question.ids[None]
        inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE_TOKEN).long()}
        return self.model(**inputs, pixel_values=question.pixel_values).logits[0]


def published_name(name: str) -> str:
    """Return the name on disk of a parameter of transformers' model."""
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and "vision_model." not in name:
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def write_gemma3(folder: Path, seed: int) -> Gemma3:
    """Write a model folder in the published layout and return its reference model."""
    reference = Gemma3(seed)
    tensors = {published_name(name): one for name, one in reference.model.state_dict().items()}
    del tensors["lm_head.weight"]
    write_folder(folder, CONFIG, tensors)
    return reference


def _question(generator: torch.Generator, words: int, *sizes: tuple[int, int]) -> Question:
    """Return `words` ids of text, then an image for each size, followed by text."""
    parts = [random_ids(words, generator).clamp(max=END - 1)]
    if not sizes:
        return Question(parts[0])
    pixels = torch.randn(len(sizes), 3, SIDE, SIDE, generator=generator)
    for _ in sizes:
        image = torch.tensor([START, *[IMAGE_TOKEN] * TOKENS, END])
        parts += [image, random_ids(4, generator).clamp(max=END - 1)]
    return Question(ids=torch.cat(parts), pixel_values=pixels)


def gemma3_cases(seed: int, _: Gemma3) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return image_cases(partial(_question, generator))
