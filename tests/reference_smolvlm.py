"""Reference SmolVLM and Idefics3 models: transformers' models with random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from references import TEXT, VOCAB, Question, image_cases, random_ids, randomize, write_folder

SIDE, LONGEST_EDGE, PATCH, SCALE, TILE_TOKENS = 32, 64, 8, 2, 4
NAMES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
TOKENS = (*NAMES, "<global-img>", "<fake_token_around_image>", "<image>")
FIRST_TOKEN = VOCAB - len(TOKENS)
IDS = {token: FIRST_TOKEN + index for index, token in enumerate(TOKENS)}
IMAGE_TOKEN, MARK, WHOLE, LINE = IDS["<image>"], IDS["<fake_token_around_image>"], VOCAB - 3, 16
PROCESSORS = {"smolvlm": "SmolVLMImageProcessor", "idefics3": "Idefics3ImageProcessor"}
TOWER = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": SIDE,
    "patch_size": PATCH,
}
ROPES = {
    "smolvlm": {"rope_theta": 130000.0},
    "idefics3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


class SmolVLM:
    """A SmolVLM or an Idefics3 with random weights; tied: whether the head is the embedding."""

    def __init__(self, seed: int, kind: str, *, tied: bool = False) -> None:
        import transformers

        name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
        self.tied = tied
        text = TEXT | ROPES[kind] | {"model_type": "llama", "max_position_embeddings": 4096}
        config = getattr(transformers, f"{name}Config")(
            text_config=text | {"tie_word_embeddings": tied},
            vision_config=TOWER,
            image_token_id=IMAGE_TOKEN,
            scale_factor=SCALE,
            tie_word_embeddings=tied,
            architectures=[f"{name}ForConditionalGeneration"],
            pad_token_id=0,
        )
        torch.manual_seed(seed)
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
            pixel_attention_mask=question.pixel_attention_mask,
        ).logits[0]


def write_smolvlm(folder: Path, seed: int, kind: str, **options: bool) -> SmolVLM:
    """Write a model folder in the published layout and return its reference model."""
    reference = SmolVLM(seed, kind, **options)
    tensors = dict(reference.model.state_dict())
    if reference.tied:
        del tensors["lm_head.weight"]
    write_folder(folder, reference.model.config.to_dict(), tensors)
    return reference


def image_ids(rows: int, columns: int) -> list[int]:
    """Return the ids of an image; it is not cut if there are no rows."""
    ids, tile = [], [IMAGE_TOKEN] * TILE_TOKENS
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            ids += [MARK, IDS[f"<row_{row}_col_{column}>"], *tile]
        ids.append(LINE)
    return [*ids, *[LINE] * bool(rows), MARK, WHOLE, *tile, MARK]


def _question(generator: torch.Generator, words: int, *sizes: tuple[int, int]) -> Question:
    """Return `words` ids of text, then images of (height, width), each followed by text.

    The last quarter of the first tile is padding.
    """
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    parts = [random_ids(words, generator).clamp(max=FIRST_TOKEN - 1)]
    if not sizes:
        return Question(parts[0])
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": LONGEST_EDGE}, max_image_size={"longest_edge": SIDE}
    )
    images = [
        torch.randint(0, 256, (*size, 3), generator=generator).numpy().astype(np.uint8)
        for size in sizes
    ]
    inputs = processor([images], return_row_col_info=True, return_tensors="pt")
    for rows, columns in zip(inputs["rows"][0], inputs["cols"][0], strict=True):
        text = random_ids(4, generator).clamp(max=FIRST_TOKEN - 1)
        parts += [torch.tensor(image_ids(int(rows), int(columns))), text]
    mask = inputs["pixel_attention_mask"]
    mask[0, 0, 3 * SIDE // 4 :] = 0
    return Question(
        ids=torch.cat(parts), pixel_values=inputs["pixel_values"], pixel_attention_mask=mask
    )


TILE_SIZES = ((40, 90), (90, 20), (30, 33), (61, 64), (20, 22))


def smolvlm_cases(seed: int, _: SmolVLM) -> dict[str, list[Question]]:
    """Return case -> questions of one batch; images have 3 or 5 tiles."""
    generator = torch.Generator().manual_seed(seed)
    return image_cases(partial(_question, generator), TILE_SIZES)
