"""Logits of a damaged model against those of transformers' own class for its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import torch
from PIL import Image

from nemo_vlm_ptq.families.base import Sample

TOLERANCE = 1e-3  # float32; logits are of the order of 1


def differs_from_transformers(folder: Path, data: Path) -> str:
    """Return how the logits of a model folder differ; "" if they do not.

    "" also where transformers has no class for the folder, or rejects it.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
    try:
        reference = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    except Exception:  # whatever it finds wrong
        return ""
    with models.single_rank() as parallel:
        samples, logits = _own_logits(parallel, folder, data)
    for sample, own in zip(samples, logits, strict=True):
        expected = _reference_logits(reference, sample)
        own = own[: len(expected), : expected.shape[1]]
        distance = float((own - expected).abs().max())
        if not distance <= TOLERANCE * max(1.0, float(expected.abs().max())):
            images = "an image" if sample.images else "no image"
            return f"logits of a question with {images} differ by {distance:.1e} of transformers'"
    return ""


def _own_logits(parallel: Any, folder: Path, data: Path) -> tuple[list[Sample], torch.Tensor]:
    """Return a question with and one without an image, and their logits [2,S,V]."""
    from rank_family_parity import import_model

    from nemo_vlm_ptq.families import find_family, read_config
    from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward

    model, vision = import_model(parallel, folder)
    config = read_config(folder)
    family = find_family(config)
    config = family.complete_config(folder, config)
    prepare = family.make_preprocessor(folder, config)
    image = Image.open(sorted((data / "images").glob("i*.png"))[0]).convert("RGB")
    samples = [prepare("image", "What is it?", image), prepare("text", "Why?")]
    (features,) = encode_images(vision, parallel, [samples], family.decoder(config).feature_width)
    return samples, forward(model, parallel, collate(samples), features)


@torch.no_grad()
def _reference_logits(reference: Any, sample: Sample) -> torch.Tensor:
    """Return logits [S,V]."""
    inputs: dict[str, Any] = {"input_ids": sample.input_ids[None]}
    if "Qwen" in type(reference).__name__:
        inputs["mm_token_type_ids"] = sample.is_image[None].int()
    if sample.images is not None:
        inputs["pixel_values"] = sample.images.pixel_values
        if sample.images.grids is not None:
            inputs["image_grid_thw"] = sample.images.grids
    return reference(**inputs).logits[0]
