"""Read and check the inputs of `logits`, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.safetensors_header import read_safetensors_header
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import IMAGE, ImageInputs, Sample
from nemo_vlm_ptq.planning.plan import Plan

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
NAMES = ("input_ids", "attention_mask", "pixel_values", "image_sizes")


def read_inputs(plan: Plan, path: Path) -> tuple[list[Sample], list[torch.Tensor | None]]:
    """Return each row of the inputs as a sample with its images, and the attention masks.

    Raises:
        UserError: the file is no safetensors file, or its tensors do not fit each other or the
            model.
    """
    read_safetensors_header(path)
    tensors = load_file(path)
    _check_ids_and_mask(plan, tensors)
    if "pixel_values" in tensors:
        _check_images(plan, tensors)
    samples, masks = _make_samples(plan, tensors)
    return samples, masks
