"""Megatron checkpoints with modelopt's quantizer state: what they store, and who loads them."""

from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.targets.spec import TargetSpec

SPEC = TargetSpec(
    name="megatron",
    folder="quantized",
    package="megatron",
    has_reader=False,
    formats=tuple(FORMATS),
    kv_caches=tuple(KV_CACHES),
    servers=dict.fromkeys(FORMATS, ("Megatron-LM",)),
)
