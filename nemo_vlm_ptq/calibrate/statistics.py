"""Sufficient statistics of the input of each linear: what observe writes and solve reads.

For every linear of a layer, per modality (row 0 text, row 1 image), over all calibration tokens:

    amax    [2,K] float32   largest |x| of each input channel
    sum     [2,K] int64     sum of |x|, in units of 2**-24: integers, so order does not matter
    tokens  [2]   int64     tokens seen
    moment.I [2,b,K-I b] float32 sum of x x^T, strip I of its upper triangle (moments.py), when a
                              format needs it; products in float32, summed in units of 2**-20

and for the attention of a layer `key.amax` and `value.amax`, [1] float32. A layer is one
safetensors file; its bytes do not depend on how many ranks observed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.moments import whole
from nemo_vlm_ptq.parallel import strips
from nemo_vlm_ptq.store import save_tensors

UNIT = 2.0**-24
LINEARS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
ROW_PARALLEL = ("linear_proj", "linear_fc2")  # each tensor rank holds a part of their input


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one linear's input over both modalities together.

    amax, mean: [K] float32; tokens: count; moment: [K,K] float32, the mean of x x^T, or None.
    """

    amax: torch.Tensor
    mean: torch.Tensor
    tokens: int
    moment: torch.Tensor | None


def layer_file(layer: int) -> str:
    """File name of a layer."""
    return f"layer_{layer:05d}.safetensors"


def save_layer(folder: Path, layer: int, tensors: dict[str, torch.Tensor]) -> str:
    """Write one layer's statistics; returns the file name."""
    save_tensors(dict(sorted(tensors.items())), folder / layer_file(layer))
    return layer_file(layer)


def load_layer(folder: Path, layer: int, device: torch.device) -> dict[str, InputStatistics]:
    """Statistics of a layer's linears with the modalities put together."""
    tensors = load_file(folder / layer_file(layer), device=str(device))
    return {name: _together(tensors, name) for name in LINEARS}


def _together(tensors: dict[str, torch.Tensor], name: str) -> InputStatistics:
    tokens = int(tensors[f"{name}.tokens"].sum())
    total = tensors[f"{name}.sum"].sum(dim=0)
    moment = None
    if f"{name}.moment.0" in tensors:
        parts = [tensors[f"{name}.moment.{i}"] for i in range(len(strips(len(total))))]
        moment = whole([(part.double().sum(dim=0) / tokens).float() for part in parts])
    return InputStatistics(
        amax=tensors[f"{name}.amax"].amax(dim=0),
        mean=(total.double() * UNIT / tokens).float(),
        tokens=tokens,
        moment=moment,
    )
