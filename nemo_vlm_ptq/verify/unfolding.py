"""Factors that folding pre_quant_scale leaves in a checkpoint, and their removal from linears.

compressed-tensors stores no pre_quant_scale, so the writer folds it into preceding tensors. The
factors are computed here from the solved scales, independently of the writer. With them a
checkpoint that was read back is compared with its source as if it had not been folded.

Legend: H hidden size, K input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.reference.checkpoint import Dequantized, ReadLinear, StoredTensors

OUTPUT_FACTORS = "output_factors"  # key beside the stored tensors of a linear
INPUT_NORMS = {"linear_qkv": "input_layernorm", "linear_fc1": "pre_mlp_layernorm"}


@dataclass
class Folds:
    """Factors of a folded model by Hugging Face name, for linears without `.weight`.

    norms: factor [H] of a norm's weight, [O] of the bias of v, and what the model adds to the
        weight before it multiplies: 1 for zero-centered RMSNorms.
    inputs: pre_quant_scale [K] that was folded away in front of a linear.
    outputs: factor [O] of a linear's output channels.
    values: per layer with attention, upper bound of the factor of the largest |value| in the KV
        cache.
    """

    norms: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)


def find_folds(
    parameter_map: Iterable[ParameterEntry],
    decoder: Decoder,
    layers: Sequence[Mapping[str, torch.Tensor]],
) -> Folds:
    """Compute the factors of a folded model.

    Args:
        parameter_map: of the model family.
        decoder: shape of the decoder.
        layers: per layer, Megatron linear -> solved pre_quant_scale [K].
    """
    folds, rows = Folds(), list(parameter_map)
    for layer, solved in enumerate(layers):
        entries = {
            entry.module_name: entry.for_layer(layer) for entry in rows if entry.in_layer(layer)
        }
        inputs = dict(solved)
        if "linear_proj" in solved and not decoder.has_linear_values:
            folds.values.append(1.0)  # nothing is folded into values
        elif "linear_proj" in solved:
            per_head = solved["linear_proj"].view(decoder.kv_heads, -1, decoder.head_dim)
            shared = per_head.min(dim=1, keepdim=True).values
            inputs["linear_proj"] = shared.repeat(1, per_head.shape[1], 1).flatten()
            _fold_attention(folds, entries, decoder, shared.flatten())
        for module, scale in inputs.items():
            folds.inputs |= dict.fromkeys(_linear_names(entries[module]), scale)
        for module in INPUT_NORMS.keys() & solved.keys():
            norm = entries[INPUT_NORMS[module]].hf_names[0]
            folds.norms[norm] = solved[module], float(decoder.zero_centered_norms)
        names = _linear_names(entries["linear_fc1"])
        folds.outputs |= _output_factors(names, [decoder.ffn], solved["linear_fc2"])
    return folds


def _fold_attention(
    folds: Folds, entries: Mapping[str, ParameterEntry], decoder: Decoder, shared: torch.Tensor
) -> None:
    """Add the factors of v, [kv_heads * head_dim], which take those of o_proj's inputs."""
    unscaled = [decoder.q_features(), decoder.kv_heads * decoder.head_dim]
    folds.outputs |= _output_factors(_linear_names(entries["linear_qkv"]), unscaled, shared)
    if "linear_qkv.bias" in entries:
        folds.norms[entries["linear_qkv.bias"].hf_names[-1]] = shared, 0.0
    folds.values.append(float(shared.max()))


def _linear_names(entry: ParameterEntry) -> list[str]:
    return [name.removesuffix(".weight") for name in entry.hf_names]


def _output_factors(
    names: list[str], unscaled: list[int], last: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the factors of q, k and v, or of gate and up, fused into one tensor or separate.

    Args:
        names: one name if the parts are fused, else one per part.
        unscaled: output features of all parts but the last, whose factor is 1.
        last: factors of the last part.
    """
    parts = [*(torch.ones(features) for features in unscaled), last]
    if len(names) == 1:
        return {names[0]: torch.cat(parts)}
    return dict(zip(names, parts, strict=True))


def unfold(linears: Mapping[str, ReadLinear], folds: Folds) -> dict[str, ReadLinear]:
    """Restore the pre_quant_scale of folded linears and divide their output factors out."""
    unfolded = {}
    for name, linear in linears.items():
        factors = folds.outputs.get(name)
        if factors is not None:
            stored = {**linear.stored, OUTPUT_FACTORS: factors}
            linear = replace(linear, stored=stored, decode=partial(_decode, linear.decode))
        unfolded[name] = replace(linear, pre_quant_scale=folds.inputs.get(name))
    return unfolded


def _decode(decode: Callable[[StoredTensors], Dequantized], stored: StoredTensors) -> Dequantized:
    folded, factor = decode(stored), stored[OUTPUT_FACTORS][:, None]
    step_error, underflow = (
        None if bound is None else bound / factor for bound in (folded.step_error, folded.underflow)
    )
    return Dequantized(folded.weight / factor, folded.step / factor, step_error, underflow)
