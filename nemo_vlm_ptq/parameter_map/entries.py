"""Rows: the one table that names every tensor in both worlds, and its exact coverage.

A row ties a Megatron name pattern to one or more Hugging Face name patterns and a layout. `{i}`
stands for the layer. The same rows serve import, export and every tensor-parallel size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.parameter_map.sharding import MERGED_PARTS, Sharding

# In torch_dist folders a norm lies under the linear that follows it, so that fused and local layers
# agree.
STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class ParameterEntry:
    """One line of the table; `linear` marks a weight that the decoder formats quantize."""

    megatron_name: str
    hf_names: tuple[str, ...]
    sharding: Sharding
    is_linear: bool = False

    def for_layer(self, layer: int) -> ParameterEntry:
        """The row with its layer filled in."""
        return ParameterEntry(
            self.megatron_name.replace("{i}", str(layer)),
            tuple(name.replace("{i}", str(layer)) for name in self.hf_names),
            self.sharding,
            self.is_linear,
        )

    @property
    def is_fused(self) -> bool:
        """Hugging Face keeps in one tensor, part after part, what others keep in several."""
        return self.sharding in MERGED_PARTS and len(self.hf_names) == 1

    @property
    def module_name(self) -> str:
        """Megatron's name of the module alone: linear_qkv, input_layernorm, word_embeddings."""
        return self.megatron_name.split(".")[-2]

    @property
    def per_layer(self) -> bool:
        """The row stands for one tensor in each layer."""
        return "{i}" in self.megatron_name


@dataclass(frozen=True)
class IgnoredTensor:
    """Source tensors that nothing here uses, and why.

    carried: they go with the tower into every export; others are left out.
    """

    pattern: str
    reason: str
    carried: bool = False


def expand_layers(rows: Iterable[ParameterEntry], layers: Iterable[int]) -> list[ParameterEntry]:
    """Rows with every layer filled in, layer by layer, rows without layers first."""
    rows = list(rows)
    flat = [row for row in rows if not row.per_layer]
    return flat + [row.for_layer(layer) for layer in layers for row in rows if row.per_layer]


def published_name(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    """The published name of a tensor found on disk under any vintage's name."""
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


def carried_names(found: Iterable[str], drops: Sequence[IgnoredTensor]) -> list[str]:
    """Names of unused tensors that go into every export beside the tower."""
    return [
        name
        for name in found
        if any(drop.carried and re.fullmatch(drop.pattern, name) for drop in drops)
    ]


def check_coverage(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    drops: Sequence[IgnoredTensor],
    where: str,
) -> None:
    """Every expected tensor is there in its shape, every other one is dropped by a stated pattern.

    Args:
        found: published name -> shape, as read from the checkpoint.
        expected: published name -> shape, from the rows and the config.
        drops: patterns of tensors that may be there and are not used.
        where: the folder, for the message.

    Raises:
        UserError: a tensor is missing, extra, or of another shape.
    """
    missing = sorted(set(expected) - set(found))
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    extra = sorted(
        name
        for name in set(found) - set(expected)
        if not any(re.fullmatch(drop.pattern, name) for drop in drops)
    )
    if extra:
        raise UserError(f"{where}: tensor {extra[0]} has no place in this family "
                        f"({len(extra)} in all)")  # fmt: skip
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(found[name])}, "
                f"the config asks for {tuple(shape)}"
            )
