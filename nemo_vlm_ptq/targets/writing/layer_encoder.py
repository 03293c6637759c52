"""Encode the source model layer by layer with solved scales, as the export targets write it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from nemo_vlm_ptq.calibrate.solve.layer import load_kv_amax, load_scales
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.calibrate.solve.scales import prepare_weight
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.sources.decoder_weights import DecoderWeights
from nemo_vlm_ptq.targets.writing.encode import (
    EncodedLayer,
    KvScales,
    encode_ends,
    encode_layer,
    kv_scales,
)

PREFETCH_LAYERS = 3  # layers encoded while one is written


class LayerEncoder:
    """Reads weights from the source and encodes one layer at a time with the scales of a format.

    Codes are on the device, scales in host memory; threads use it inside `stream`. nf4 is encoded
    from unprepared weights, whose blocks have the absmax that is stored.

    Args:
        context: plan and ranks.
        fmt: the format.
        weights: the source's decoder, on the device.
    """

    def __init__(self, context: RunContext, fmt: QuantFormat, weights: DecoderWeights) -> None:
        self.plan, self.fmt, self.weights = context.plan, fmt, weights
        self.kv_format = KV_CACHES.get(context.plan.recipe.quantize.kv_cache)
        self.device = context.parallel.device
        self.scales_folder = context.folder(fmt.name, "scales")

    def layer(self, index: int) -> EncodedLayer:
        """Return one layer, unsharded."""
        return self.shards(index, [0], 1)[0]

    def shards(self, index: int, ranks: Iterable[int], T: int) -> dict[int, EncodedLayer]:
        """Return one layer as some serving ranks of T hold it."""
        scales = load_scales(self.scales_folder, index)
        prepared = self._prepare(index, scales)
        return {t: self._encode(index, scales, prepared, (t, T)) for t in ranks}

    def _encode(
        self,
        index: int,
        scales: Mapping[str, LinearScales],
        prepared: Mapping[str, torch.Tensor],
        shard: tuple[int, int],
    ) -> EncodedLayer:
        """Return a shard of a layer; prepared: Megatron name -> whole weight to encode."""
        return encode_layer(
            self.plan.parameter_map,
            index,
            lambda names: {name: prepared[name] for name in names},
            scales,
            self.fmt,
            self.plan.decoder,
            shard,
        )

    def kv(self, index: int) -> KvScales | None:
        """Return the KV cache scales of one layer, None for a 16 bit cache or without attention."""
        if self.kv_format is None or not self.plan.decoder.has_attention(index):
            return None
        key, value = load_kv_amax(self.scales_folder, index)
        return kv_scales(key, value, self.kv_format)

    def ends(self, shard: tuple[int, int] = (0, 1)) -> EncodedLayer:
        """Return embedding, final norm and head as serving rank t of T holds them."""
        parameter_map = self.plan.parameter_map
        return encode_ends(parameter_map, self.weights.read, self.plan.decoder, shard)

    def _prepare(self, index: int, scales: Mapping[str, LinearScales]) -> dict[str, torch.Tensor]:
        prepared = {}
        for entry in self.plan.parameter_map:
            if not entry.in_layer(index):
                continue
            name = entry.for_layer(index).megatron_name
            prepared[name] = self.weights.shard(name)
            if entry.is_linear and self.fmt.weight != "nf4":
                linear = scales[entry.module_name].to(self.device)
                prepared[name] = prepare_weight(prepared[name], linear, self.fmt)
        return prepared

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run the GPU work of this thread beside the default stream, and wait for it at the end."""
        if self.device.type != "cuda":
            yield
            return
        stream = _export_stream(self.device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


@functools.cache
def _export_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all exports; memory freed in one stream serves only that stream."""
    return torch.cuda.Stream(device)
