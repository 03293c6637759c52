"""Inputs of the solve tests: one layer of small random linears, and statistics of known tokens."""

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.second_moments import MOMENT_UNIT
from nemo_vlm_ptq.calibrate.sketch import (
    SKETCH_UNIT,
    accumulate_blocks,
    accumulate_sketch,
    assign_tokens,
    zero_blocks,
)
from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, solve_layer
from nemo_vlm_ptq.calibrate.statistics import SUM_UNIT, assemble_layer, layer_file, save_layer
from nemo_vlm_ptq.constants import SKETCH_ROWS
from nemo_vlm_ptq.distributed.moment_strips import strips
from nemo_vlm_ptq.families import FAMILIES, Decoder
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes

GROUP_SIZE = 32
SIZES = HeadSizes(heads=8, kv_heads=4, head_dim=16, vocab=64, padded_vocab=64)
DECODER = Decoder(
    hidden=128, ffn=192, layers=1, heads=8, kv_heads=4, head_dim=16, vocab=64,
    norm_eps=1e-5, rope_theta=1e4, max_positions=64,
)  # fmt: skip
SHAPES = {  # Megatron weights at hidden size 128 and MLP size 192
    "linear_qkv": (256, 128),
    "linear_proj": (128, 128),
    "linear_fc1": (384, 128),
    "linear_fc2": (128, 192),
}
DEFAULT_OPTIONS = SolveOptions()
TOKEN_COUNTS = {"text": 60, "image": 300}


def make_tokens(width, counts=TOKEN_COUNTS, seed=0):
    """Return modality -> inputs [T,K]; channel magnitudes and correlations differ by modality."""
    tokens = {}
    for modality, count in counts.items():
        generator = torch.Generator().manual_seed(2 * seed + (modality == "image"))
        magnitude = torch.exp(torch.randn(width, generator=generator))
        mixing = torch.randn(width, width, generator=generator) / width**0.5
        independent = torch.randn(count, width, generator=generator)
        tokens[modality] = (independent @ (torch.eye(width) + mixing)) * magnitude
    return tokens


def observe_tokens(folder, counts=TOKEN_COUNTS, *, whole=True):
    """Return (linear -> statistics, linear -> tokens), through a file as observe writes it.

    whole: with whole second moments instead of sketches.
    """
    tensors = {"key.amax": torch.tensor([3.3]), "value.amax": torch.tensor([0.7])}
    tokens = {}
    for seed, (name, (_, width)) in enumerate(SHAPES.items()):
        tokens[name] = make_tokens(width, counts, seed)
        empty = torch.zeros(0, width)
        rows = [tokens[name].get(modality, empty) for modality in ("text", "image")]
        tensors[f"{name}.amax"] = torch.stack(
            [x.abs().amax(0) if len(x) else torch.zeros(width) for x in rows]
        )
        tensors[f"{name}.sum"] = torch.stack(
            [(x.double().abs().sum(0) / SUM_UNIT).round().long() for x in rows]
        )
        tensors[f"{name}.tokens"] = torch.tensor([len(x) for x in rows])
        for i, strip in enumerate(strips(width)):
            tensors[f"{name}.moment.{i}"] = torch.stack(
                [(x.double().T @ x.double())[strip, strip.start :].float() for x in rows]
            )
        tensors |= sketch_tokens(name, rows)
    save_layer(folder, 0, tensors)
    return assemble_layer(load_file(folder / layer_file(0)), whole=whole), tokens


def sketch_tokens(name, rows):
    """Return sketch and blocks of the tokens [T,K] of both modalities, as one sample each."""
    width, device = rows[0].shape[1], torch.device("cpu")
    modality = torch.zeros(2, max(len(x) for x in rows), dtype=torch.int8)
    x_SBK = torch.zeros(modality.shape[1], 2, width)
    sketch = torch.zeros(2 * SKETCH_ROWS, width, dtype=torch.float64)
    blocks = zero_blocks(width, device)
    for sample, x in enumerate(rows):
        modality[sample, : len(x)] = sample + 1
        x_SBK[: len(x), sample] = x
        accumulate_blocks(blocks, x, torch.full((len(x),), sample + 1))
    tokens = assign_tokens(["a", "b"], modality, SKETCH_ROWS, device)
    accumulate_sketch(sketch, x_SBK.flatten(0, 1), tokens)
    return {
        f"{name}.sketch": (sketch * SKETCH_UNIT).float().view(2, SKETCH_ROWS, width),
        f"{name}.blocks": (blocks * MOMENT_UNIT).float(),
    }


def make_weights(dtype=torch.float32):
    """Return linear -> Megatron weight, with some larger rows and columns."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, (rows, width) in SHAPES.items():
        magnitude = torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
        magnitude = magnitude * torch.exp(0.5 * torch.randn(width, generator=generator))
        weight = torch.randn(rows, width, generator=generator) * magnitude * 0.05
        weights[name] = weight.to(dtype)
    return weights


def layer_entries(family):
    """Return the parameter entries of layer 0."""
    rows = FAMILIES[family].parameter_map(DECODER)
    return [entry.for_layer(0) for entry in rows if entry.per_layer]


def solve(name, observed_layer, dtype=torch.float32, options=DEFAULT_OPTIONS):
    """Return linear -> scales of the format `name`."""
    statistics = observed_layer[0]
    return solve_layer(
        make_weights(dtype),
        statistics,
        FORMATS[name],
        GROUP_SIZE,
        SIZES,
        options,
        layer_entries("llava"),
    )
