"""Sufficient statistics of the input of each linear: what observe writes and solve reads.

For every linear of a layer, per modality (row 0 text, row 1 image), over all calibration tokens:

    amax    [2,K] float32   largest |x| of each input channel
    sum     [2,K] int64     sum of |x|, in units of 2**-24: integers, so order does not matter
    tokens  [2]   int64     tokens seen
    moment.I [2,b,K-I b] float32 sum of x x^T, strip I of its upper triangle (moments.py), when a
                              format needs it; products in float32, summed in units of 2**-16

and for the attention of a layer `key.amax` and `value.amax`, [1] float32. A layer is one
safetensors file; its bytes do not depend on how many ranks observed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.losses import gram_dtype, gram_matrix, row_chunks, weighted_trace
from nemo_vlm_ptq.calibrate.second_moments import assemble
from nemo_vlm_ptq.checkpoints.hashing_writer import write_tensors
from nemo_vlm_ptq.distributed.layout import strips
from nemo_vlm_ptq.utils.pinned_memory import to_device

UNIT = 2.0**-24
LINEARS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
MODALITY_ROWS = ("text", "image")  # rows of a statistic
ROW_PARALLEL = ("linear_proj", "linear_fc2")  # each tensor rank holds a part of their input


@dataclass(frozen=True)
class ModalityStatistics:
    """Statistics of one linear's input over the tokens of one kind.

    tokens: count; mean: [K] float32, of |x|; moment: [K,K] float32, the mean of x x^T, or None.
    """

    tokens: int
    mean: torch.Tensor
    moment: torch.Tensor | None


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one linear's input over all tokens.

    amax, mean: [K] float32; tokens: count; moment: [K,K] float32, the mean of x x^T, or None;
    modalities: "text" and "image", as far as there were tokens of them; power: float64 [] by kind
    of tokens, the mean of |x W^T|^2 with the linear's weight W, once `with_power` has filled it.
    """

    amax: torch.Tensor
    mean: torch.Tensor
    tokens: int
    moment: torch.Tensor | None
    modalities: Mapping[str, ModalityStatistics] = field(default_factory=dict)
    output_power: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """Second moments by kind of tokens: "all", and "text" and "image" as far as they came."""
        kinds = {"all": self.moment} | {kind: one.moment for kind, one in self.modalities.items()}
        return {kind: moment for kind, moment in kinds.items() if moment is not None}

    def with_output_power(self, weight_OK: torch.Tensor) -> InputStatistics:
        """With `power`, which is the same for every format."""
        if self.output_power or self.moment is None:
            return self
        dtype = gram_dtype(weight_OK.device)
        whole_KK = gram_matrix(weight_OK[rows].to(dtype) for rows in row_chunks(weight_OK.shape))
        output_power = {
            kind: weighted_trace(whole_KK, moment) for kind, moment in self.moments.items()
        }
        return replace(self, output_power=output_power)

    @property
    def image_share(self) -> float | None:
        """Image tokens of all tokens, or None where one kind is missing."""
        if len(self.modalities) < len(MODALITY_ROWS):
            return None
        return self.modalities["image"].tokens / self.tokens

    def with_image_share(self, share: float | None) -> InputStatistics:
        """Means as if `share` of the tokens were of images; amax stays the largest of all.

        As it is with share None, or where there is one kind of tokens.
        """
        if share is None or self.image_share is None:
            return self
        text, image = self.modalities["text"], self.modalities["image"]
        moment = None
        if text.moment is not None and image.moment is not None:
            moment = torch.lerp(text.moment, image.moment, share)
        return replace(self, mean=torch.lerp(text.mean, image.mean, share), moment=moment)


def layer_file(layer: int) -> str:
    """File name of a layer."""
    return f"layer_{layer:05d}.safetensors"


def save_layer(folder: Path, layer: int, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Write one layer's statistics; returns the file's name and its sha256."""
    return layer_file(layer), write_tensors(tensors, folder / layer_file(layer))


def load_tokens(folder: Path, layer: int) -> list[int]:
    """Tokens that a layer has seen, of text and of images."""
    with safe_open(folder / layer_file(layer), framework="pt") as file:
        return file.get_tensor("linear_qkv.tokens").tolist()


def load_attention(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest magnitude of a layer's keys and of its values, float32 [1] each."""
    with safe_open(folder / layer_file(layer), framework="pt") as file:
        return file.get_tensor("key.amax"), file.get_tensor("value.amax")


def load_layer(folder: Path, layer: int, device: torch.device) -> dict[str, InputStatistics]:
    """Statistics of a layer's linears, of all tokens and of each modality."""
    stored = load_file(folder / layer_file(layer))  # its own way to a GPU is a plain copy
    return assemble_layer({name: to_device(tensor, device) for name, tensor in stored.items()})


def assemble_layer(tensors: dict[str, torch.Tensor]) -> dict[str, InputStatistics]:
    """Linear -> statistics, from the tensors of a layer's file; second moments are taken out."""
    return {name: _together(tensors, name) for name in LINEARS}


def _together(tensors: dict[str, torch.Tensor], name: str) -> InputStatistics:
    counts = dict(zip(MODALITY_ROWS, tensors[f"{name}.tokens"].tolist(), strict=True))
    sums = tensors[f"{name}.sum"]
    strip_names = [f"{name}.moment.{i}" for i in range(len(strips(sums.shape[1])))]
    parts = [tensors.pop(key) for key in strip_names if key in tensors]

    def over(
        tokens: int, total: torch.Tensor, strips_of: Sequence[torch.Tensor]
    ) -> ModalityStatistics:
        mean = (total.double() * UNIT / tokens).float()
        return ModalityStatistics(
            tokens, mean, assemble(strips_of).div_(tokens) if strips_of else None
        )

    seen = {kind: row for row, (kind, tokens) in enumerate(counts.items()) if tokens}
    single = {
        kind: over(counts[kind], sums[row], [part[row] for part in parts])
        for kind, row in seen.items()
    }
    every = next(iter(single.values()))
    if len(single) > 1:
        every = over(sum(counts.values()), sums.sum(dim=0), [part.sum(dim=0) for part in parts])
    amax = tensors[f"{name}.amax"].amax(dim=0)
    return InputStatistics(amax, every.mean, every.tokens, every.moment, single)
