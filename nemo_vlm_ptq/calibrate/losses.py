"""How far a linear's output moves when its weight changes, from second moments of its input.

The mean over tokens of |x dW^T|^2 is tr(dW H dW^T), with H the mean of x x^T: the number that
replaying every token would give. Rows are cut at fixed places, so results do not depend on the
memory of a device or on ranks.

Legend: O output features, K input features, N some rows of a weight, G groups of g inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

CHUNK_ELEMENTS = 2**25  # numbers of a matrix that are worked on at once: 128 MiB of float32


@contextlib.contextmanager
def allow_tf32() -> Iterator[None]:
    """float32 products may take TF32 on a GPU.

    Each factor is then off by 2^-11 at most, at random; a sum over millions of products is off by
    far less than candidates differ.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def row_chunks(shape: Sequence[int], numbers: int = CHUNK_ELEMENTS) -> list[slice]:
    """Slices of at most so many numbers that cover the rows of a matrix."""
    rows, width = shape
    height = max(1, numbers // width)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def max_abs(matrix_OK: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest magnitude along an axis, float32, without a copy of the matrix."""
    return torch.linalg.vector_norm(matrix_OK, torch.inf, dim=dim, dtype=torch.float32)


def group_amax(weight_OK: torch.Tensor, group: int) -> torch.Tensor:
    """Largest magnitude of each group of inputs, float32 [O,G]."""
    return max_abs(weight_OK.unflatten(1, (-1, group)), dim=2)


def row_losses(change_NK: torch.Tensor, moment_KK: torch.Tensor) -> torch.Tensor:
    """dw H dw^T of each row, float64 [N]."""
    with allow_tf32():
        product = change_NK @ moment_KK
    return product.mul_(change_NK).sum(dim=1).double()


def gram_dtype(device: torch.device) -> torch.dtype:
    """What a matrix is rounded to for `gram`, to tell of its size and not to choose by it.

    bfloat16 on a GPU: twice as fast as TF32, and as far off as a millionth.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def gram_matrix(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """A^T A [K,K] of a matrix A that comes in parts of its rows, in their dtype, float32 at least.

    This one product gives tr(A H A^T) for any number of H.
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


def weighted_trace(gram_KK: torch.Tensor, moment_KK: torch.Tensor) -> torch.Tensor:
    """tr(A H A^T) from A^T A and H, float64 []: the sum over both, entry by entry."""
    return torch.linalg.vecdot(gram_KK, moment_KK).double().sum()
