"""compressed-tensors checkpoints: what they store, and who loads them."""

from nemo_vlm_ptq.targets.spec import TargetSpec

FORMATS = (
    "fp8", "fp8_pc_pt", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4", "int8_wo", "int4_wo",
)  # fmt: skip
SPEC = TargetSpec(
    name="compressed_tensors",
    folder="compressed_tensors",
    package="compressed_tensors",
    formats=FORMATS,
    kv_caches=("fp8",),
    servers=dict.fromkeys(FORMATS, ("vLLM", "transformers")),
    int4_group_sizes=(32, 64, 128),
    folds_scales=True,
    dynamic_w4a8_inputs=True,
    int_scales_in_model_dtype=True,
)
