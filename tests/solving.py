"""A layer of small random linears, and statistics of known tokens, to solve."""

import torch

from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, solve_layer
from nemo_vlm_ptq.calibrate.statistics import (
    UNIT,
    load_layer,
    save_layer,
)
from nemo_vlm_ptq.distributed.layout import strips
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes

GROUP = 32
SIZES = HeadSizes(heads=8, kv_heads=4, head_dim=16, vocab=64, padded_vocab=64)
SHAPES = {  # of Megatron's weights at hidden 128 and MLP 192
    "linear_qkv": (256, 128),
    "linear_proj": (128, 128),
    "linear_fc1": (384, 128),
    "linear_fc2": (128, 192),
}
PLAIN = SolveOptions()
TOKENS = {"text": 60, "image": 300}


def tokens(width, kinds=TOKENS, seed=0):
    """kind -> inputs [T,K]; channels differ in size, and in other ways for text and for images."""
    found = {}
    for kind, count in kinds.items():
        made = torch.Generator().manual_seed(2 * seed + (kind == "image"))
        size = torch.exp(torch.randn(width, generator=made))
        mixed = torch.randn(width, width, generator=made) / width**0.5
        found[kind] = (
            torch.randn(count, width, generator=made) @ (torch.eye(width) + mixed)
        ) * size
    return found


def observed(folder, kinds=TOKENS):
    """linear -> statistics of these tokens, through a file as observe writes it; and the tokens."""
    tensors, given = {"key.amax": torch.tensor([3.3]), "value.amax": torch.tensor([0.7])}, {}
    for seed, (name, (_, width)) in enumerate(SHAPES.items()):
        x = given[name] = tokens(width, kinds, seed)
        none = torch.zeros(0, width)
        both = [x.get("text", none), x.get("image", none)]
        tensors[f"{name}.amax"] = torch.stack(
            [part.abs().amax(0) if len(part) else torch.zeros(width) for part in both]
        )
        tensors[f"{name}.sum"] = torch.stack(
            [(part.double().abs().sum(0) / UNIT).round().long() for part in both]
        )
        tensors[f"{name}.tokens"] = torch.tensor([len(part) for part in both])
        for i, rows in enumerate(strips(width)):
            tensors[f"{name}.moment.{i}"] = torch.stack(
                [(part.double().T @ part.double())[rows, rows.start :].float() for part in both]
            )
    save_layer(folder, 0, tensors)
    return load_layer(folder, 0, torch.device("cpu")), given


def weights(dtype=torch.float32):
    """linear -> Megatron's weight; some rows and columns are larger."""
    made = torch.Generator().manual_seed(7)
    found = {}
    for name, (rows, width) in SHAPES.items():
        size = torch.exp(0.5 * torch.randn(rows, 1, generator=made))
        size = size * torch.exp(0.5 * torch.randn(width, generator=made))
        found[name] = (torch.randn(rows, width, generator=made) * size * 0.05).to(dtype)
    return found


def rows_of(family):
    return [row.for_layer(0) for row in FAMILIES[family].parameter_map if row.per_layer]


def solved(name, layer, dtype=torch.float32, wishes=PLAIN):
    rows = rows_of("llava")
    return solve_layer(weights(dtype), layer[0], FORMATS[name], GROUP, SIZES, wishes, rows)
