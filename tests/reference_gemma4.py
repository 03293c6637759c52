"""Reference Gemma 4: transformers' model with random weights in the published layout."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from references import TEXT, VOCAB, Question, image_cases, random_ids, randomize, write_folder

IMAGE_TOKEN, START, END = VOCAB - 1, VOCAB - 2, VOCAB - 3
PATCH, POOLING, MOST_TOKENS = 4, 2, 70  # the least that the published processor takes
LLM = TEXT | {
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "final_logit_softcapping": 20.0,  # twice the deviation of the logits
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 4096,
    "num_global_key_value_heads": 4,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
    "sliding_window": 3,  # tokens: shorter than some images
    "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision",
}  # fmt: skip
TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": PATCH,
    "pooling_kernel_size": POOLING,
    "position_embedding_size": MOST_TOKENS * POOLING,
    "standardize": True,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}
CONFIG = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "audio_config": None,
    "text_config": LLM,
    "vision_config": TOWER,
    "image_token_id": IMAGE_TOKEN,
    "boi_token_id": START,
    "eoi_token_id": END,
    "video_token_id": VOCAB - 4,
    "audio_token_id": VOCAB - 5,
    "tie_word_embeddings": True,
}
LEAST_SPECIAL = VOCAB - 5


PLAIN = {  # of the text: values from v_proj in all layers, no softcap, images as text
    "attention_k_eq_v": False,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
}


class Gemma4:
    """Gemma 4 with random weights; factors of layers and of the tower are not neutral."""

    def __init__(self, seed: int, config: dict = CONFIG) -> None:
        from transformers import Gemma4Config, Gemma4ForConditionalGeneration

        model = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(deepcopy(config)))
        self.model = randomize(model, seed)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "std_bias", "std_scale")):
                buffer.copy_(0.7 + 0.2 * torch.rand_like(buffer))
        self.model.tie_weights()

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V]."""
        ids, images = question.ids[None], {}
        if question.pixel_values is not None:
            images = {
                "pixel_values": question.pixel_values,
                "image_position_ids": question.image_position_ids,
            }
        types = (ids == IMAGE_TOKEN).long()
        return self.model(input_ids=ids, mm_token_type_ids=types, **images).logits[0]


def write_gemma4(folder: Path, seed: int, *, plain: bool = False, tied: bool = True) -> Gemma4:
    """Write a model folder in the published layout and return its reference model.

    Args:
        folder: where to write.
        seed: of the weights.
        plain: see PLAIN.
        tied: whether the embedding is the head, without a copy of it.
    """
    config = CONFIG | {"text_config": LLM | PLAIN} if plain else CONFIG
    reference = Gemma4(seed, config)
    tensors = dict(reference.model.state_dict())
    if tied:
        del tensors["lm_head.weight"]
    else:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    write_folder(folder, config, tensors)
    return reference


def _question(generator: torch.Generator, words: int, *sizes: tuple[int, int]) -> Question:
    """Return `words` ids of text, then images of (height, width), each followed by text."""
    parts = [random_ids(words, generator).clamp(max=LEAST_SPECIAL - 1)]
    if not sizes:
        return Question(parts[0])
    pixels, places = [], []
    for height, width in sizes:
        rows, columns = (POOLING * max(1, side // 24) for side in (height, width))
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        padding = 2 * POOLING**2 * 4 - len(grid)
        pad = partial(torch.nn.functional.pad, pad=(0, 0, 0, padding))
        pixels.append(pad(torch.rand(len(grid), 3 * PATCH**2, generator=generator)))
        places.append(pad(grid, value=-1))
        image = [START, *[IMAGE_TOKEN] * (len(grid) // POOLING**2), END]
        text = random_ids(4, generator).clamp(max=LEAST_SPECIAL - 1)
        parts += [torch.tensor(image), text]
    return Question(
        ids=torch.cat(parts),
        pixel_values=torch.stack(pixels),
        image_position_ids=torch.stack(places),
    )


def gemma4_cases(seed: int, _: Gemma4) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return image_cases(partial(_question, generator))
