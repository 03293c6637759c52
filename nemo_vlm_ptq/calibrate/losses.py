"""Output loss of a linear whose weight changes, computed from second moments of its input.

The mean over tokens of |x dW^T|^2 equals tr(dW E[x x^T] dW^T): the number that replaying all tokens
gives, at a cost that does not depend on the number of tokens. Weights are processed in row chunks
of a fixed size, so results do not depend on device memory or on ranks.

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


def row_losses(delta_NK: torch.Tensor, second_moment_KK: torch.Tensor) -> torch.Tensor:
    """Return dw E[x x^T] dw^T of each row dw, float64 [N]."""
    with allow_tf32():
        product = delta_NK @ second_moment_KK
    return product.mul_(delta_NK).sum(dim=1).double()


def gram_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that a matrix is rounded to for a Gram matrix that is only reported.

    bfloat16 on a GPU: twice as fast as TF32, with a relative error of about 1e-6 in the trace.
    Candidates are never compared at this precision.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def gram_matrix(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return A^T A [K,K] of a matrix A given as chunks of rows, in their dtype, float32 at least.

    One such product serves tr(A M A^T) for any number of second moments M.
    """
    total: torch.Tensor | None = None
    with allow_tf32():
        for part_NK in parts:
            if part_NK.dtype == torch.bfloat16:  # on a GPU: products are exact, sums float32
                product = torch.mm(part_NK.T, part_NK, out_dtype=torch.float32)
                total = product if total is None else total.add_(product)
            else:
                total = part_NK.T @ part_NK if total is None else total.addmm_(part_NK.T, part_NK)
    assert total is not None
    return total


def weighted_trace(gram_KK: torch.Tensor, second_moment_KK: torch.Tensor) -> torch.Tensor:
    """Return tr(A M A^T), float64 []: the elementwise dot product of A^T A and a symmetric M."""
    return torch.linalg.vecdot(gram_KK, second_moment_KK).double().sum()
