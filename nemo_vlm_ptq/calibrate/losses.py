"""Matrix products and maxima of weights, in row chunks.

Chunks have a fixed size, so results do not depend on device memory or on ranks.

Legend: O output features, K input features, N rows of a weight, G groups of inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

CHUNK_ELEMENTS = 2**25  # elements of a matrix processed at once: 128 MiB of float32


@contextlib.contextmanager
def allow_tf32() -> Iterator[None]:
    """Allow TF32 in float32 matrix products on a GPU inside the context.

    Each factor then has a random relative error of up to 2^-11. Over a sum of millions of products
    the error is far smaller than the differences between candidates.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def row_chunks(shape: Sequence[int], max_elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """Return slices that cover the rows of a matrix, of at most `max_elements` elements each."""
    rows, width = shape
    height = max(1, max_elements // width)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def max_abs(matrix_OK: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the largest magnitude along an axis, float32, without copying the matrix."""
    return torch.linalg.vector_norm(matrix_OK, torch.inf, dim=dim, dtype=torch.float32)


def group_amax(weight_OK: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the largest magnitude of each group of inputs, float32 [O,G]."""
    return max_abs(weight_OK.unflatten(1, (-1, group_size)), dim=2)


def gram_matrix(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return A^T A [K,K] of a matrix A given as chunks of rows, in their dtype."""
    total: torch.Tensor | None = None
    for part_NK in parts:
        total = part_NK.T @ part_NK if total is None else total.addmm_(part_NK.T, part_NK)
    assert total is not None
    return total
