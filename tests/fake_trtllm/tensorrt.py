"""What the worker takes of TensorRT."""


class DataType:
    """Types of numbers."""

    HALF = "half"
