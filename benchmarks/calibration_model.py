"""Decoder and image features with random weights, for benchmarks/calibration.py.

Weights are drawn per tensor from a seed of its name, so that all models and all layouts have the
same weights without a checkpoint.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from calibration_common import FAMILY, IMAGE_TOKENS, Workload
from megatron.core.models.gpt import GPTModel
from random_model import random_tensor

from nemo_vlm_ptq.families.base import ImageInputs
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source
from nemo_vlm_ptq.megatron.forward import collate, forward
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext


class RandomWeights:
    """Random weights by published name, drawn on request with a seed derived from the name."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.shapes = workload.decoder.shapes(FAMILY.parameter_map)
        self.device = device

    def get_slice(self, name: str) -> torch.Tensor:
        """Return the whole tensor in bf16."""
        seed = zlib.crc32(name.encode())
        generator = torch.Generator(self.device).manual_seed(seed)
        return random_tensor(name, self.shapes[name], generator)


class RandomFeatures(torch.nn.Module):
    """Replacement of the vision module: the same random features [IMAGE_TOKENS,H] for any image."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__()
        features = torch.randn(
            IMAGE_TOKENS, workload.decoder.hidden, generator=torch.Generator().manual_seed(0)
        )
        self.features = torch.nn.Parameter(features.to(device, torch.bfloat16), requires_grad=False)

    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images."""
        return self.features.repeat(len(images.pixel_values), 1)


def build_random_decoder(
    parallel: ParallelContext,
    workload: Workload,
    weight_device: torch.device,
    *,
    for_calibration: bool = False,
) -> GPTModel:
    """Build this rank's shards of the decoder with the random weights.

    Args:
        parallel: this rank's parallel context.
        workload: sizes of the decoder.
        weight_device: device on which the weights are drawn.
        for_calibration: build the model that observe runs.
    """
    decoder = workload.decoder
    model = build_decoder(decoder, parallel, torch.bfloat16, for_calibration=for_calibration)
    weights: Any = RandomWeights(workload, weight_device)
    load_from_source(model, parallel, FAMILY.parameter_map, decoder, weights)
    return model


def run_forward(
    model: GPTModel, parallel: ParallelContext, micro_batches: list[Any], features: torch.Tensor
) -> None:
    """Run micro-batches through the model without observers."""
    for samples in micro_batches:
        forward(model, parallel, collate(samples), features.repeat(len(samples), 1))
