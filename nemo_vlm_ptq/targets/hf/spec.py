"""Unified Hugging Face checkpoints: what they store, and who loads them.

Servers are those whose loaders list the quant_algo: TensorRT-LLM 1.2 (tensorrt_llm/_torch/modules/
linear.py), vLLM 0.22 (quantization/modelopt.py), transformers (bitsandbytes).
"""

from nemo_vlm_ptq.targets.spec import TargetSpec

SERVERS = {
    "fp8": ("TensorRT-LLM", "vLLM"),
    "fp8_pc_pt": ("TensorRT-LLM", "vLLM"),
    "int4_awq": ("TensorRT-LLM",),
    "w4a8_awq": ("TensorRT-LLM",),
    "nvfp4": ("TensorRT-LLM", "vLLM"),
    "nvfp4_awq": ("TensorRT-LLM",),
    "nvfp4_svdquant": (),
    "int8_wo": ("TensorRT-LLM",),
    "int4_wo": ("TensorRT-LLM",),
    "nf4": ("transformers", "vLLM"),
}
KV_CACHES = ("fp8", "nvfp4")
SPEC = TargetSpec(
    name="hf",
    folder="hf",
    package="hf",
    formats=tuple(SERVERS),
    kv_caches=KV_CACHES,
    unsupported_pairs=tuple(("nf4", kv_cache) for kv_cache in KV_CACHES),
    servers=SERVERS,
)
