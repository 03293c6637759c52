"""Fake tensorrt_llm._utils."""


def trt_dtype_to_torch(dtype):
    """Return the dtype: the fake uses torch's."""
    return dtype
