"""What the worker takes of TensorRT-LLM's helpers."""


def trt_dtype_to_torch(dtype):
    """Here they are the same."""
    return dtype
