"""Reference LLaVA-OneVision: transformers' model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import published_name
from reference_llava_next import CLIP, GRIDS, IMAGE_TOKEN, SIDE, LlavaNext
from references import TEXT, randomize, write_folder

VIDEO_TOKEN = 1  # not among the random ids
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
PINPOINTS = [[SIDE, SIDE], *GRIDS]
LAYERS = TEXT | {"model_type": "qwen2", "max_position_embeddings": 4096, "rope_theta": 1e6}


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision with random weights; images of more than two tiles are reduced."""

    def __init__(self, seed: int, *, tied: bool = False) -> None:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        config = LlavaOnevisionConfig(
            text_config=LAYERS | {"tie_word_embeddings": tied},
            vision_config=SIGLIP,
            image_grid_pinpoints=PINPOINTS,
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
            vision_aspect_ratio="anyres_max_2",
            architectures=["LlavaOnevisionForConditionalGeneration"],
        )
        torch.manual_seed(seed)  # transformers initializes the newline at random
        self.model = randomize(LlavaOnevisionForConditionalGeneration(config), seed)
        if tied:
            self.model.tie_weights()

    def process(self, images: list) -> Any:
        """Return the model inputs of images."""
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        square = {"height": SIDE, "width": SIDE}
        processor = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=PINPOINTS)
        return processor(images, return_tensors="pt")


def write_llava_onevision(folder: Path, seed: int, *, tied: bool = False) -> LlavaOnevision:
    """Write a model folder in the published layout and return its reference model.

    That the head is tied is said in text_config alone, as in the published config of 0.5B.
    """
    reference = LlavaOnevision(seed, tied=tied)
    tensors = {published_name(name): t for name, t in reference.model.state_dict().items()}
    if tied:
        del tensors["language_model.lm_head.weight"]
    config = reference.model.config.to_dict() | {"tie_word_embeddings": False}
    write_folder(folder, config, tensors)
    return reference
