"""Sufficient statistics of the linears' inputs: written by observe, read by solve.

Every format's scales follow from them without another forward pass, and their size does not depend
on the number of samples. For each linear of a layer, per modality (row 0 text, row 1 image), over
all calibration tokens:

    amax      [2,K] float32        largest |x| of each input channel
    sum       [2,K] int64          sum of |x| in units of 2**-24; integers add in any order
    tokens    [2]   int64          number of tokens
    sketch    [2,m,K] float32      signed sums of tokens in m rows (sketch.py), and
    blocks    [2,G,g,g] float32    sum of x x^T, its diagonal blocks, if a search needs them
    moment.I  [2,b,K-I b] float32  sum of x x^T, strip I of its upper triangle
                                   (second_moments.py), if a format needs it whole

and for the attention of a layer `key.amax` and `value.amax`, [1] float32. A layer is one
safetensors file, whose bytes do not depend on the number of ranks that observe.

Legend: O output features, K input features, m rows of a sketch, G blocks of g, b rows of a strip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_vlm_ptq.calibrate.input_moment import InputMoment, diagonal_blocks, mix_moments
from nemo_vlm_ptq.calibrate.losses import row_chunks
from nemo_vlm_ptq.calibrate.second_moments import assemble_strips
from nemo_vlm_ptq.calibrate.sketch import block_features
from nemo_vlm_ptq.checkpoints.hashing_writer import write_and_hash
from nemo_vlm_ptq.distributed.moment_strips import strips

SUM_UNIT = 2.0**-24
LINEARS = {  # name -> module path in a Megatron transformer layer
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
MODALITY_ROWS = ("text", "image")  # rows of a statistic
ROW_PARALLEL = ("linear_proj", "linear_fc2")  # sharded along the input features
IN_ALL_LAYERS = "linear_fc2"  # layers without attention have only those of the MLP


@dataclass(frozen=True)
class ModalityStatistics:
    """Statistics of one linear's input over the calibration tokens of one modality.

    tokens: number of tokens.
    abs_mean: [K] float32, mean of |x|.
    moment: mean of x x^T, or None if it was not observed.
    """

    tokens: int
    abs_mean: torch.Tensor
    moment: InputMoment | None


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one linear's input over all calibration tokens.

    amax: [K] float32, largest |x|.
    abs_mean: [K] float32, mean of |x|.
    tokens: number of tokens.
    moment: mean of x x^T, or None if it was not observed.
    modalities: statistics of "text" and "image", without a modality that has no tokens.
    output_power: modality -> mean of |x W^T|^2 with the linear's weight W, float64 []; empty unless
        made by `with_output_power`.
    """

    amax: torch.Tensor
    abs_mean: torch.Tensor
    tokens: int
    moment: InputMoment | None
    modalities: Mapping[str, ModalityStatistics] = field(default_factory=dict)
    output_power: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, InputMoment]:
        """Second moment of each modality, as far as they were observed."""
        found = {modality: statistics.moment for modality, statistics in self.modalities.items()}
        return {modality: moment for modality, moment in found.items() if moment is not None}

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of the tokens that each modality has."""
        return {name: modality.tokens / self.tokens for name, modality in self.modalities.items()}

    def with_output_power(self, weight_OK: torch.Tensor) -> InputStatistics:
        """Return a copy with `output_power`, which all formats share."""
        if self.output_power or self.moment is None:
            return self
        output_power = {
            modality: moment.loss(weight_OK[rows].float() for rows in row_chunks(weight_OK.shape))
            for modality, moment in self.moments.items()
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
        moment = None
        if text.moment is not None and image.moment is not None:
            moment = mix_moments((text.moment, image.moment), (1 - image_share, image_share))
        abs_mean = torch.lerp(text.abs_mean, image.abs_mean, image_share)
        return replace(self, abs_mean=abs_mean, moment=moment)


def layer_linears(block: Any) -> dict[str, Any]:
    """Return linear -> module of a Megatron transformer layer, of those that it has."""
    found = {}
    for name, path in LINEARS.items():
        home, _, attribute = path.rpartition(".")
        if hasattr(block.get_submodule(home), attribute):
            found[name] = block.get_submodule(path)
    return found


def layer_file(layer: int) -> str:
    """Return the file name of a layer."""
    return f"layer_{layer:05d}.safetensors"


def save_layer(folder: Path, layer: int, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Write the statistics of one layer and return the file's name and sha256."""
    return layer_file(layer), write_and_hash(tensors, folder / layer_file(layer))


def load_token_counts(folder: Path, layer: int) -> list[int]:
    """Return the numbers of text and of image tokens that a layer's statistics cover."""
    with safe_open(folder / layer_file(layer), framework="pt") as file:
        return file.get_tensor(f"{IN_ALL_LAYERS}.tokens").tolist()


def load_observed_kv_amax(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest magnitudes of a layer's keys and values, float32 [1] each."""
    with safe_open(folder / layer_file(layer), framework="pt") as file:
        return file.get_tensor("key.amax"), file.get_tensor("value.amax")


def assemble_layer(
    tensors: Mapping[str, torch.Tensor], *, whole: bool = False
) -> dict[str, InputStatistics]:
    """Build linear -> statistics from the tensors of a layer's file, on their device.

    Args:
        tensors: by name.
        whole: take whole second moments, not sketches; without either there are no moments.
    """
    names = [name for name in LINEARS if f"{name}.tokens" in tensors]
    return {name: _assemble_linear(tensors, name, whole=whole) for name in names}


def has_sketch(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a layer's tensors include sketches."""
    return f"{IN_ALL_LAYERS}.sketch" in tensors


def _assemble_linear(
    tensors: Mapping[str, torch.Tensor], name: str, *, whole: bool
) -> InputStatistics:
    """Build the statistics of one linear."""
    counts: list[int] = tensors[f"{name}.tokens"].tolist()
    sums, total = tensors[f"{name}.sum"], sum(counts)
    moment = _whole_moment if whole else _sketched_moment
    modalities = {
        modality: ModalityStatistics(
            tokens=counts[row],
            abs_mean=(sums[row].double() * SUM_UNIT / counts[row]).float(),
            moment=moment(tensors, name, row, counts[row]),
        )
        for row, modality in enumerate(MODALITY_ROWS)
        if counts[row]
    }
    found = [(one.moment, one.tokens / total) for one in modalities.values() if one.moment]
    return InputStatistics(
        amax=tensors[f"{name}.amax"].amax(dim=0),
        abs_mean=(sums.sum(dim=0).double() * SUM_UNIT / total).float(),
        tokens=total,
        moment=mix_moments(*zip(*found, strict=True)) if found else None,
        modalities=modalities,
    )


def _sketched_moment(
    tensors: Mapping[str, torch.Tensor], name: str, row: int, tokens: int
) -> InputMoment | None:
    """Return the second moment of one modality as a sketch gives it."""
    if f"{name}.sketch" not in tensors:
        return None
    return InputMoment(
        root_MK=tensors[f"{name}.sketch"][row] / tokens**0.5,
        blocks_Ggg=tensors[f"{name}.blocks"][row] / tokens,
    )


def _whole_moment(
    tensors: Mapping[str, torch.Tensor], name: str, row: int, tokens: int
) -> InputMoment | None:
    """Return the whole second moment of one modality."""
    width = tensors[f"{name}.sum"].shape[1]
    keys = [f"{name}.moment.{i}" for i in range(len(strips(width)))]
    if keys[0] not in tensors:
        return None
    whole_KK = assemble_strips([tensors[key][row] for key in keys]).div_(tokens)
    return InputMoment(
        whole_KK=whole_KK, blocks_Ggg=diagonal_blocks(whole_KK, block_features(width))
    )
