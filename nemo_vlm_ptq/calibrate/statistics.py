"""Sufficient statistics of the linears' inputs: written by observe, read by solve.

Every format's scales follow from them without another forward pass, and their size does not depend
on the number of samples. For each linear of a layer, per modality (row 0 text, row 1 image), over
all calibration tokens:

    amax      [2,K] float32        largest |x| of each input channel
    sum       [2,K] int64          sum of |x| in units of 2**-24; integers add in any order
    tokens    [2]   int64          number of tokens
    moment.I  [2,b,K-I b] float32  sum of x x^T, strip I of its upper triangle
                                   (second_moments.py), if a format needs it

and for the attention of a layer `key.amax` and `value.amax`, [1] float32. A layer is one
safetensors file, whose bytes do not depend on the number of ranks that observe.

Legend: O output features, K input features, b rows of a strip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.losses import gram_dtype, gram_matrix, row_chunks, weighted_trace
from nemo_vlm_ptq.calibrate.second_moments import assemble_strips
from nemo_vlm_ptq.checkpoints.hashing_writer import write_and_hash
from nemo_vlm_ptq.distributed.moment_strips import strips
from nemo_vlm_ptq.utils.pinned_memory import to_device

SUM_UNIT = 2.0**-24
LINEARS = {  # name -> module path in a Megatron transformer layer
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
MODALITY_ROWS = ("text", "image")  # rows of a statistic
ROW_PARALLEL = ("linear_proj", "linear_fc2")  # sharded along the input features


@dataclass(frozen=True)
class ModalityStatistics:
    """Statistics of one linear's input over the calibration tokens of one modality.

    tokens: number of tokens.
    abs_mean: [K] float32, mean of |x|.
    second_moment: [K,K] float32, mean of x x^T, or None if it was not observed.
    """

    tokens: int
    abs_mean: torch.Tensor
    second_moment: torch.Tensor | None


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one linear's input over all calibration tokens.

    amax: [K] float32, largest |x|.
    abs_mean: [K] float32, mean of |x|.
    tokens: number of tokens.
    second_moment: [K,K] float32, mean of x x^T, or None if it was not observed.
    modalities: statistics of "text" and "image", without a modality that has no tokens.
    output_power: keys of `second_moments` -> mean of |x W^T|^2 with the linear's weight W,
        float64 []; empty unless made by `with_output_power`.
    """

    amax: torch.Tensor
    abs_mean: torch.Tensor
    tokens: int
    second_moment: torch.Tensor | None
    modalities: Mapping[str, ModalityStatistics] = field(default_factory=dict)
    output_power: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def second_moments(self) -> dict[str, torch.Tensor]:
        """Second moments of "all" tokens and of each modality, as far as they were observed."""
        found = {"all": self.second_moment} | {
            modality: statistics.second_moment for modality, statistics in self.modalities.items()
        }
        return {key: moment_KK for key, moment_KK in found.items() if moment_KK is not None}

    def with_output_power(self, weight_OK: torch.Tensor) -> InputStatistics:
        """Return a copy with `output_power`, which all formats share."""
        if self.output_power or self.second_moment is None:
            return self
        dtype = gram_dtype(weight_OK.device)
        gram_KK = gram_matrix(weight_OK[rows].to(dtype) for rows in row_chunks(weight_OK.shape))
        output_power = {
            key: weighted_trace(gram_KK, moment_KK)
            for key, moment_KK in self.second_moments.items()
        }
        return replace(self, output_power=output_power)

    @property
    def image_share(self) -> float | None:
        """Fraction of image tokens, or None if a modality has no tokens."""
        if len(self.modalities) < len(MODALITY_ROWS):
            return None
        return self.modalities["image"].tokens / self.tokens

    def with_image_share(self, image_share: float | None) -> InputStatistics:
        """Return means reweighted as if this fraction of the tokens were image tokens.

        `amax` stays that of all tokens. Nothing changes if `image_share` is None or a modality has
        no tokens.
        """
        if image_share is None or self.image_share is None:
            return self
        text, image = self.modalities["text"], self.modalities["image"]
        second_moment = None
        if text.second_moment is not None and image.second_moment is not None:
            second_moment = torch.lerp(text.second_moment, image.second_moment, image_share)
        abs_mean = torch.lerp(text.abs_mean, image.abs_mean, image_share)
        return replace(self, abs_mean=abs_mean, second_moment=second_moment)


def layer_file(layer: int) -> str:
    """Return the file name of a layer."""
    return f"layer_{layer:05d}.safetensors"


def save_layer(folder: Path, layer: int, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Write the statistics of one layer and return the file's name and sha256."""
    return layer_file(layer), write_and_hash(tensors, folder / layer_file(layer))


def load_token_counts(folder: Path, layer: int) -> list[int]:
    """Return the numbers of text and of image tokens that a layer's statistics cover."""
    with safe_open(folder / layer_file(layer), framework="pt") as file:
        return file.get_tensor("linear_qkv.tokens").tolist()


def load_observed_kv_amax(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest magnitudes of a layer's keys and values, float32 [1] each."""
    with safe_open(folder / layer_file(layer), framework="pt") as file:
        return file.get_tensor("key.amax"), file.get_tensor("value.amax")


def load_layer(folder: Path, layer: int, device: torch.device) -> dict[str, InputStatistics]:
    """Load the statistics of a layer's linears onto a device."""
    stored = load_file(folder / layer_file(layer))  # loading to a GPU directly is a pageable copy
    return assemble_layer({name: to_device(tensor, device) for name, tensor in stored.items()})


def assemble_layer(tensors: dict[str, torch.Tensor]) -> dict[str, InputStatistics]:
    """Build linear -> statistics from the tensors of a layer's file.

    Strips are removed from `tensors`, so that they can be freed early.
    """
    return {name: _assemble_linear(tensors, name) for name in LINEARS}


def _assemble_linear(tensors: dict[str, torch.Tensor], name: str) -> InputStatistics:
    """Build the statistics of one linear; its strips are removed from `tensors`."""
    counts: list[int] = tensors[f"{name}.tokens"].tolist()
    sums = tensors[f"{name}.sum"]
    strip_names = [f"{name}.moment.{i}" for i in range(len(strips(sums.shape[1])))]
    parts = [tensors.pop(key) for key in strip_names if key in tensors]
    modalities = {
        modality: _normalize(counts[row], sums[row], [part[row] for part in parts])
        for row, modality in enumerate(MODALITY_ROWS)
        if counts[row]
    }
    overall = next(iter(modalities.values()))
    if len(modalities) > 1:
        overall = _normalize(sum(counts), sums.sum(dim=0), [part.sum(dim=0) for part in parts])
    return InputStatistics(
        amax=tensors[f"{name}.amax"].amax(dim=0),
        abs_mean=overall.abs_mean,
        tokens=overall.tokens,
        second_moment=overall.second_moment,
        modalities=modalities,
    )


def _normalize(
    tokens: int, abs_sum_K: torch.Tensor, parts: Sequence[torch.Tensor]
) -> ModalityStatistics:
    """Divide the sum of |x| and the strips of x x^T by the number of tokens."""
    abs_mean = (abs_sum_K.double() * SUM_UNIT / tokens).float()
    second_moment = assemble_strips(parts).div_(tokens) if parts else None
    return ModalityStatistics(tokens=tokens, abs_mean=abs_mean, second_moment=second_moment)
