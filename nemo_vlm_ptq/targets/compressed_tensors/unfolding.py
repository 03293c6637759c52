"""Where solved scales went in a checkpoint that has no place for them in front of linears.

Factors are worked out from the solved scales; with them a read checkpoint is compared with its
source as if the scales were still there.

Legend: H hidden, K inputs of a linear, O its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.reference.checkpoint import Codes, Dequantized, ReadLinear

ROWS = "factors of rows"  # beside the codes of a linear
NORM_OF = {"linear_qkv": "input_layernorm", "linear_fc1": "pre_mlp_layernorm"}


@dataclass
class Folds:
    """Factors by Hugging Face name, linears without `.weight`.

    norms [H], inputs [K] of linears, rows [O] of linears; values: by how much a layer's largest
    |value| grew at most.
    """

    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)


def find_folds(
    rows: Iterable[ParameterEntry], decoder: Decoder, layers: Sequence[Mapping[str, torch.Tensor]]
) -> Folds:
    """Factors of a model.

    Args:
        rows: the family's table.
        decoder: facts.
        layers: linear -> scale [K] that was solved for its input, layer by layer.
    """
    folds, table = Folds(), {row.module_name: row for row in rows}
    width, queries = decoder.head_dim, decoder.heads // decoder.kv_heads
    for layer, solved in enumerate(layers):
        per_head = solved["linear_proj"].view(decoder.kv_heads, queries, width)
        least = per_head.min(dim=1, keepdim=True).values
        inputs = {**solved, "linear_proj": least.repeat(1, queries, 1).flatten()}
        own = {short: row.for_layer(layer) for short, row in table.items()}
        names = {
            short: [name.removesuffix(".weight") for name in own[short].hf_names]
            for short in inputs
        }
        for short, scale in inputs.items():
            folds.inputs |= dict.fromkeys(names[short], scale)
        for short, norm in NORM_OF.items():
            folds.norms[own[norm].hf_names[0]] = solved[short]
        still = [decoder.heads * width, decoder.kv_heads * width]
        folds.rows |= _rows(names["linear_qkv"], still, least.flatten())
        folds.rows |= _rows(names["linear_fc1"], [decoder.ffn], solved["linear_fc2"])
        folds.values.append(float(least.max()))
    return folds


def _rows(names: list[str], still: list[int], last: torch.Tensor) -> dict[str, torch.Tensor]:
    """Factors of parts that lie above each other, in one tensor or several; only the last moved."""
    parts = [*(torch.ones(count) for count in still), last]
    if len(names) == 1:
        return {names[0]: torch.cat(parts)}
    return dict(zip(names, parts, strict=True))


def unfold(linears: Mapping[str, ReadLinear], folds: Folds) -> dict[str, ReadLinear]:
    """Linears as they would be with their scales in front of them."""
    found = {}
    for name, linear in linears.items():
        rows = folds.rows.get(name)
        if rows is not None:
            codes = {**linear.codes, ROWS: rows}
            linear = replace(linear, codes=codes, decode=partial(_unfolded, linear.decode))
        found[name] = replace(linear, pre_quant_scale=folds.inputs.get(name))
    return found


def _unfolded(decode: Callable[[Codes], Dequantized], codes: Codes) -> Dequantized:
    found, factor = decode(codes), codes[ROWS][:, None]
    return replace(found, weight=found.weight / factor, step=found.step / factor)
