"""NeMo 2 checkpoints: what they store, and who loads them."""

from nemo_vlm_ptq.targets.spec import TargetSpec

FORMATS = (
    "fp8", "fp8_pc_pt", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4", "nvfp4_awq", "int8_wo",
    "int4_wo",
)  # fmt: skip
SPEC = TargetSpec(
    name="nemo",
    folder="nemo",
    package="nemo2",
    made_from="megatron",
    formats=FORMATS,
    servers=dict.fromkeys(FORMATS, ("NeMo 2.7",)),
    legacy="NeMo 3 replaced NeMo 2 checkpoints by Megatron-Bridge's",
)
