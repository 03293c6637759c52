"""TensorRT-LLM engine checkpoints: what they store, and who loads them."""

from nemo_vlm_ptq.targets.spec import TargetSpec

FORMATS = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
SPEC = TargetSpec(
    name="trtllm",
    folder="trtllm",
    package="trtllm",
    formats=FORMATS,
    kv_caches=("fp8", "int8"),
    unsupported_pairs=(("nvfp4", "int8"),),
    servers=dict.fromkeys(FORMATS, ("TensorRT-LLM 0.18 to 1.2.1",)),
    int4_group_sizes=(64, 128),
    layout_keys=("tensor", "pipeline"),
    shares_kv_scale=True,
    legacy="TensorRT-LLM removed the engine backend after 1.2.1",
)
