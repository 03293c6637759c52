"""Megatron-core: process groups, building and running the decoder, checkpoints.

Importing megatron-core takes seconds, half of them for `torch.compile`, which it applies to fused
functions that this package does not call. The import leaves these functions as they are.
"""

from unittest.mock import patch


def _identity(function: object = None, **_: object) -> object:
    return function if callable(function) else lambda inner: inner


with patch("torch.compile", _identity):
    import megatron.core.models.gpt  # noqa: F401
