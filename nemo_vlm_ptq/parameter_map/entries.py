"""Parameter map: Megatron parameter names, the Hugging Face tensors they hold, and their sharding.

An entry maps one Megatron name to one or more Hugging Face names; `{i}` stands for the layer index.
Import and export use the same entries at every tensor-parallel size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.parameter_map.sharding import MERGED_PARTS, Sharding


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """One Megatron parameter and the Hugging Face tensors that it holds.

    Attributes:
        megatron_name: name of the parameter, with `{i}` for the layer index.
        hf_names: published names of its parts, in order; a single name if HF fuses them.
        sharding: how the parameter is sharded over tensor-parallel ranks.
        is_linear: whether decoder formats quantize the parameter.
        is_tied: whether another entry has the same Hugging Face tensor, which exports hold once.
        layers: the layers that have it, in the same shape; None: all.
        keeps_dtype: whether exports hold it in the dtype of the source.
    """

    megatron_name: str
    hf_names: tuple[str, ...]
    sharding: Sharding
    is_linear: bool = False
    is_tied: bool = False
    layers: frozenset[int] | None = None
    keeps_dtype: bool = False

    def in_layer(self, layer: int) -> bool:
        """Return whether a layer has this parameter."""
        return self.per_layer and (self.layers is None or layer in self.layers)

    def for_layer(self, layer: int) -> ParameterEntry:
        """Return the entry with the layer index filled in."""
        return replace(
            self,
            megatron_name=self.megatron_name.replace("{i}", str(layer)),
            hf_names=tuple(name.replace("{i}", str(layer)) for name in self.hf_names),
        )

    @property
    def first_layer(self) -> int:
        """The first layer that has it; its shape is that of all of them."""
        return min(self.layers, default=0) if self.layers is not None else 0

    @property
    def is_fused(self) -> bool:
        """Whether one Hugging Face tensor holds all parts (q, k, v or gate, up), concatenated."""
        return self.sharding in MERGED_PARTS and len(self.hf_names) == 1

    @property
    def module_name(self) -> str:
        """Last component of the Megatron module, e.g. linear_qkv, linear_qkv.bias for a bias."""
        *_, module, leaf = self.megatron_name.split(".")
        return module if leaf == "weight" else f"{module}.{leaf}"

    @property
    def per_layer(self) -> bool:
        """Whether layers have this parameter, all of them or some."""
        return "{i}" in self.megatron_name


@dataclass(frozen=True, kw_only=True)
class IgnoredTensor:
    """Tensors of a checkpoint that no module of this package uses.

    Attributes:
        pattern: regular expression for the published names.
        reason: why they are not used.
        passthrough: whether exports contain them, unchanged.
    """

    pattern: str
    reason: str
    passthrough: bool = False


def expand_layers(
    parameter_map: Iterable[ParameterEntry], layers: Iterable[int]
) -> list[ParameterEntry]:
    """Return the entries without layer index, then those of each layer."""
    entries = list(parameter_map)
    expanded = [entry for entry in entries if not entry.per_layer]
    for layer in layers:
        expanded += [entry.for_layer(layer) for entry in entries if entry.in_layer(layer)]
    return expanded


def published_name(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    """Return the published name of a tensor that another release of transformers named.

    Args:
        name: name in the checkpoint.
        aliases: (pattern, replacement) pairs, applied in order.
    """
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


def passthrough_names(names: Iterable[str], ignored: Sequence[IgnoredTensor]) -> list[str]:
    """Return the names of ignored tensors that exports contain."""
    return [
        name
        for name in names
        if any(entry.passthrough and re.fullmatch(entry.pattern, name) for entry in ignored)
    ]


def check_coverage(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    ignored: Sequence[IgnoredTensor],
    where: str,
) -> None:
    """Check that a checkpoint has exactly the expected and, optionally, the ignored tensors.

    Args:
        found: published name -> shape in the checkpoint.
        expected: published name -> shape from the parameter map and the config.
        ignored: tensors that may exist.
        where: prefix of error messages, e.g. the folder.

    Raises:
        UserError: a tensor is missing, unexpected, or has another shape.
    """
    missing = sorted(set(expected) - set(found))
    if missing:
        raise UserError(f"{where}: missing tensor {missing[0]} ({len(missing)} missing in total)")
    unexpected = sorted(
        name
        for name in set(found) - set(expected)
        if not any(re.fullmatch(entry.pattern, name) for entry in ignored)
    )
    if unexpected:
        raise UserError(f"{where}: unexpected tensor {unexpected[0]} ({len(unexpected)} in total)")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(found[name])}, expected {tuple(shape)}"
            )
