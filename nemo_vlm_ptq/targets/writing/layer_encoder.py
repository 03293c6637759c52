"""Encode a quantized Megatron checkpoint layer by layer, as the export targets write it."""

from __future__ import annotations

from nemo_vlm_ptq.calibrate.solve.layer import load_kv_amax, load_scales
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.targets.writing.encode import (
    EncodedLayer,
    KvScales,
    encode_ends,
    encode_layer,
    kv_scales,
)

PREFETCH_LAYERS = 3  # layers encoded while one is written


class LayerEncoder:
    """Reads and encodes one layer of a quantized checkpoint at a time.

    nf4 is encoded from the imported weights: the quantized checkpoint holds fake-quantized weights,
    from which the absmax of each block cannot be recovered.

    Args:
        context: plan and ranks.
        fmt: the format.
    """

    def __init__(self, context: RunContext, fmt: QuantFormat) -> None:
        self.plan, self.fmt = context.plan, fmt
        self.kv_format = KV_CACHES.get(context.plan.recipe.quantize.kv_cache)
        self.device = context.parallel.device
        self.scales_folder = context.folder(fmt.name, "scales")
        self.imported = LayerReader(context.folder("megatron"))
        self.reader = self.imported
        if fmt.weight != "nf4":
            self.reader = LayerReader(context.folder(fmt.name, "quantized"))

    def layer(self, index: int, shard: tuple[int, int] = (0, 1)) -> EncodedLayer:
        """Return one layer as serving rank t of T holds it; shard: (t, T)."""
        return encode_layer(
            self.plan.family.parameter_map,
            index,
            self.reader.slices,
            load_scales(self.scales_folder, index),
            self.fmt,
            self.plan.decoder,
            self.device,
            shard,
        )

    def kv(self, index: int) -> KvScales | None:
        """Return the KV cache scales of one layer, or None for a 16 bit cache."""
        if self.kv_format is None:
            return None
        key, value = load_kv_amax(self.scales_folder, index)
        return kv_scales(key, value, self.kv_format)

    def ends(self, shard: tuple[int, int] = (0, 1)) -> EncodedLayer:
        """Return embedding, final norm and head as serving rank t of T holds them."""
        parameter_map = self.plan.family.parameter_map
        return encode_ends(parameter_map, self.reader.slices, self.plan.decoder, shard)
