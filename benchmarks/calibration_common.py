"""Configs, cases and workload of benchmarks/calibration.py."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from random_model import published_config

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.base import Decoder, ImageInputs, Sample

FAMILY = FAMILIES["llava"]
MODEL = "llava-1.5-7b-hf"
IMAGE_TOKENS = 576
GROUP_SIZE = 128  # weights that share an int4 scale
SMALL_DECODER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "vocab_size": 512,
}
FORWARD = "forward pass"
OBSERVE_MAXIMA, OBSERVE_MOMENTS = "observe, maxima", "observe, second moments"
FIVE_FORMATS = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
ALL_FIVE = "all five"
CASE_FORMATS = {  # case -> formats that are calibrated together
    **{name: (name,) for name in ("fp8", "int8_sq", "int4_awq")},
    ALL_FIVE: FIVE_FORMATS,
}
MODELOPT_PRESETS = {  # format -> modelopt's name
    "fp8": "FP8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
}


def log(message: str) -> None:
    """Print a line with the time of day to stderr, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class BenchmarkConfig:
    """A part of the benchmark and the ranks that run it.

    name: name on the command line and in the results file.
    part: package, modelopt or profile.
    description: name in the report.
    tensor: tensor-parallel size.
    data: data-parallel size.
    time_weight: share of the remaining time, relative to other configs.
    """

    name: str
    part: str
    description: str
    tensor: int = 1
    data: int = 1
    time_weight: float = 1.0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.data


CONFIGS = {
    config.name: config
    for config in (
        BenchmarkConfig("package-1", "package", "1 rank"),
        BenchmarkConfig("package-dp2", "package", "DP 2", data=2),
        BenchmarkConfig("package-tp2", "package", "TP 2", tensor=2),
        BenchmarkConfig("profile", "profile", "1 rank", time_weight=0.3),
        BenchmarkConfig("modelopt-hf", "modelopt", "Hugging Face model, one device"),
        BenchmarkConfig("modelopt-split", "modelopt", "Hugging Face model split over two GPUs"),
        BenchmarkConfig("modelopt-tp1", "modelopt", "Megatron-core, one rank"),
        BenchmarkConfig("modelopt-tp2", "modelopt", "Megatron-core, TP 2", tensor=2),
    )
}
SINGLE_RANK = "package-1"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of the model, of the data and of the runs.

    layers: decoder layers.
    samples: calibration samples.
    more_samples: a second number of calibration samples; 0 to skip it.
    text_tokens: text tokens per sample.
    micro_batch: samples per micro-batch.
    repeats: largest number of runs of a case.
    small: use SMALL_DECODER instead of the decoder of LLaVA-1.5-7B.
    """

    layers: int
    samples: int
    more_samples: int
    text_tokens: int
    micro_batch: int
    repeats: int
    small: bool

    @property
    def model_config(self) -> dict[str, Any]:
        """config.json of the model."""
        config = published_config(MODEL)
        config["text_config"] |= {"num_hidden_layers": self.layers}
        config["text_config"] |= SMALL_DECODER if self.small else {}
        return config

    @cached_property
    def decoder(self) -> Decoder:
        """Architecture of the decoder."""
        return FAMILY.decoder(self.model_config)

    @property
    def tokens_per_sample(self) -> int:
        """Image and text tokens of a sample."""
        return IMAGE_TOKENS + self.text_tokens

    @property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linears."""
        linears = tuple(entry for entry in FAMILY.parameter_map if entry.is_linear)
        return sum(math.prod(shape) for shape in self.decoder.shapes(linears).values())

    def forward_flop(self, samples: int) -> float:
        """Return the FLOP of a forward pass without output layer.

        Counts the linears and the half of the attention scores that is not masked.
        """
        decoder, tokens = self.decoder, self.tokens_per_sample
        attention = 2 * decoder.layers * tokens**2 * decoder.heads * decoder.head_dim
        return samples * (2.0 * self.linear_parameters * tokens + attention)

    def micro_batches(self, samples: int) -> list[list[Sample]]:
        """Return micro-batches of samples with the image tokens in the middle of random text."""
        generator = torch.Generator().manual_seed(0)
        start = self.text_tokens // 2
        images = ImageInputs(pixel_values=torch.zeros(1, 3, 2, 2))
        is_image = torch.zeros(self.tokens_per_sample, dtype=torch.bool)
        is_image[start : start + IMAGE_TOKENS] = True
        ids = [
            torch.randint(self.decoder.vocab, (self.tokens_per_sample,), generator=generator)
            for _ in range(samples)
        ]
        items = [
            Sample(id=f"{i:05d}", input_ids=input_ids, is_image=is_image, images=images)
            for i, input_ids in enumerate(ids)
        ]
        return [items[i : i + self.micro_batch] for i in range(0, samples, self.micro_batch)]
