"""Parameter map of layers with a Gated DeltaNet, whose tensors stay in 16 bit."""

from __future__ import annotations

from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry

NAMES = (
    *("A_log", "dt_bias", "conv1d.weight", "norm.weight", "out_proj.weight"),
    *(f"in_proj_{part}.weight" for part in ("qkv", "z", "a", "b")),
)
# computed with in float32, and published so
KEPT = ("A_log", "dt_bias", "norm.weight")


def delta_net_entries(decoder: Decoder, layer: str, megatron: str) -> list[ParameterEntry]:
    """Return the entries of the layers with a DeltaNet; none if the decoder has none.

    Args:
        decoder: says which layers.
        layer: prefix of the published names in a layer.
        megatron: prefix of the names in a layer's attention.
    """
    if decoder.delta_net is None:
        return []
    layers = frozenset(index for index, has_it in enumerate(decoder.delta_net.layers) if has_it)
    return [
        ParameterEntry(
            megatron_name=megatron + name,
            hf_names=(f"{layer}linear_attn.{name}",),
            sharding="replicate",
            layers=layers,
            keeps_dtype=name in KEPT,
        )
        for name in NAMES
    ]
