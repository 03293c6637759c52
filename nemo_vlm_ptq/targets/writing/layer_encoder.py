"""A quantized checkpoint layer by layer, as the targets of export take it."""

from __future__ import annotations

from nemo_vlm_ptq.calibrate.solve.layer import load_kv, load_scales
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.targets.compressed_tensors.folding import fold_kv, fold_layer
from nemo_vlm_ptq.targets.writing.encode import (
    EncodedLayer,
    KvScales,
    encode_ends,
    encode_layer,
    kv_scales,
)

PREFETCH_LAYERS = 3  # layers that are made while one is written


class LayerEncoder:
    """Layers of a quantized checkpoint, read and encoded one at a time.

    In nf4 the checkpoint holds rounded weights, whose blocks have lost their absmaxes; codes are
    made of the imported weights.

    Args:
        job: plan and ranks.
        fmt: the format.
        folds: scales in front of linears go into what comes before them.
    """

    def __init__(self, job: RunContext, fmt: QuantFormat, *, folds: bool = False) -> None:
        self.plan, self.fmt, self.folds = job.plan, fmt, folds
        self.kv_format = KV_CACHES.get(job.plan.recipe.quantize.kv_cache)
        self.device = job.parallel.device
        self.scales = job.folder(fmt.name, "scales")
        self.imported = LayerReader(job.folder("megatron"))
        self.reader = self.imported
        if fmt.weight != "nf4":
            self.reader = LayerReader(job.folder(fmt.name, "quantized"))

    def layer(self, index: int, shard: tuple[int, int] = (0, 1)) -> EncodedLayer:
        """One layer, as shard t of T holds it."""
        scales = load_scales(self.scales, index)
        rows, decoder = self.plan.family.parameter_map, self.plan.decoder
        read, device = self.reader.slices, self.device
        layer = encode_layer(rows, index, read, scales, self.fmt, decoder, device, shard)
        if not self.folds:
            return layer
        return fold_layer(layer, scales, self.imported.read, self.fmt, decoder)

    def kv(self, index: int) -> KvScales | None:
        """Scales of one layer's KV cache, if it is rounded."""
        if self.kv_format is None:
            return None
        key, value = load_kv(self.scales, index)
        kv = kv_scales(key, value, self.kv_format)
        if not self.folds:
            return kv
        return fold_kv(kv, load_scales(self.scales, index), self.plan.decoder.sizes(1))

    def ends(self, shard: tuple[int, int] = (0, 1)) -> EncodedLayer:
        """Embedding, last norm, head, as shard t of T holds them."""
        read = self.reader.slices
        return encode_ends(self.plan.family.parameter_map, read, self.plan.decoder, shard)
