"""Write compressed-tensors checkpoints, as vLLM and transformers read them.

pre_quant_scales have no place in this format: they are folded into the preceding norms and linears.
"""

from __future__ import annotations

from typing import Any

from nemo_vlm_ptq.calibrate.solve.layer import load_scales
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.targets.compressed_tensors.config import ignore_patterns, quantization_config
from nemo_vlm_ptq.targets.compressed_tensors.folding import fold_kv, fold_layer
from nemo_vlm_ptq.targets.compressed_tensors.tensors import kv_tensors, linear_tensors
from nemo_vlm_ptq.targets.writing.encode import EncodedLayer, KvScales
from nemo_vlm_ptq.targets.writing.layer_encoder import LayerEncoder
from nemo_vlm_ptq.targets.writing.published import PublishedFormat, unquantized_weights


class FoldingEncoder(LayerEncoder):
    """Encodes layers with their pre_quant_scales folded away."""

    def layer(self, index: int) -> EncodedLayer:
        """Return one layer without pre_quant_scales."""
        scales = load_scales(self.scales_folder, index)
        layer = super().layer(index)
        return fold_layer(layer, scales, self.weights.read, self.fmt, self.plan.decoder)

    def kv(self, index: int) -> KvScales | None:
        """Return the KV cache scales of one layer whose values were scaled by the folding."""
        kv = super().kv(index)
        if kv is None:
            return None
        sizes = self.plan.decoder.sizes(1, index)
        return fold_kv(kv, load_scales(self.scales_folder, index), sizes)


def _describe(context: RunContext, fmt: QuantFormat, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return config.json with its quantization_config."""
    plan = context.plan
    plain, quantized = unquantized_weights(context, names)
    home = plan.family.decoder_subfolder
    prefix = f"{home}/" if home else ""
    head = {plan.head_name: (plan.decoder.vocab, plan.decoder.hidden)}  # not a tensor if tied
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
    shapes = {name: (head | shapes)[prefix + name] for name in plain}
    quantize = plan.recipe.quantize
    block = quantization_config(
        fmt,
        quantize.group_size,
        ignore_patterns(shapes, quantized),
        KV_CACHES.get(quantize.kv_cache),
    )
    config = plan.family.decoder_config(plan.export_config)
    return {"config.json": config | {"quantization_config": block}}


PUBLISHED = PublishedFormat(
    linear_tensors=linear_tensors,
    kv_tensors=kv_tensors,
    describe=_describe,
    encoder=FoldingEncoder,
)
