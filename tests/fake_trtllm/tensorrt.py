"""Fake tensorrt: what the worker uses of it."""


class DataType:
    """Tensor dtypes."""

    HALF = "half"
