"""Reference Mistral 3, Ministral 3 and Pixtral: transformers' models with random weights."""

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
MINISTRAL = LLM | {
    "model_type": "ministral3",
    "max_position_embeddings": 16384,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
del MINISTRAL["rope_theta"]
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
    """A model with random weights.

    kind: mistral, ministral3 or pixtral.
    tied: whether the head is the embedding.
    mscale: of YaRN; other than 1, it scales cosine and sine.
    """

    def __init__(
        self, seed: int, kind: str = "mistral", *, tied: bool = False, mscale: float = 1.0
    ) -> None:
        import transformers

        self.kind, self.tied = kind, tied
        name = "Llava" if kind == "pixtral" else "Mistral3"
        text = MINISTRAL if kind == "ministral3" else LLM
        if kind == "ministral3":
            rope = MINISTRAL["rope_parameters"] | {"mscale": mscale}
            text = MINISTRAL | {"rope_parameters": rope}
        own = {"spatial_merge_size": MERGE}
        if kind == "pixtral":
            own = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        config = getattr(transformers, f"{name}Config")(
            text_config=text | {"tie_word_embeddings": tied},
            vision_config=TOWER,
            image_token_index=IMAGE_TOKEN,
            tie_word_embeddings=tied,
            architectures=[f"{name}ForConditionalGeneration"],
            **own,
        )
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        self.model = randomize(model, seed)
        if tied:
            self.model.tie_weights()

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


def write_mistral3(folder: Path, seed: int, kind: str = "mistral", **options) -> Mistral3:
    """Write a model folder in the published layout and return its reference model."""
    reference = Mistral3(seed, kind, **options)
    tensors = {published_name(name): t for name, t in reference.model.state_dict().items()}
    if reference.tied:
        del tensors["language_model.lm_head.weight"]
    write_folder(folder, reference.model.config.to_dict(), tensors)
    return reference


def _question(
    generator: torch.Generator, side: int, words: int, *sizes: tuple[int, int]
) -> Question:
    """Return `words` ids of text, then images of (height, width), each followed by text."""
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    parts = [random_ids(words, generator).clamp(max=IMAGE_END - 1)]
    if not sizes:
        return Question(parts[0])
    processor = PixtralImageProcessorPil(size={"longest_edge": LONGEST_EDGE}, patch_size=side)
    images = [
        torch.randint(0, 256, (*size, 3), generator=generator).numpy().astype(np.uint8)
        for size in sizes
    ]
    inputs = processor(images, return_tensors="pt")
    image_sizes = torch.as_tensor(inputs["image_sizes"])
    for height, width in (image_sizes // side).tolist():
        row = [*[IMAGE_TOKEN] * width, ROW_END]
        parts += [
            torch.tensor([*row * (height - 1), *row[:-1], IMAGE_END]),
            random_ids(4, generator).clamp(max=IMAGE_END - 1),
        ]
    return Question(
        ids=torch.cat(parts), pixel_values=inputs["pixel_values"], image_sizes=image_sizes
    )


def mistral3_cases(seed: int, reference: Mistral3) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    side = PATCH if reference.kind == "pixtral" else PATCH * MERGE
    return image_cases(partial(_question, generator, side))
