"""Low-rank branch of SVDQuant: the leading singular directions of a weight stay in 16 bit.

The method follows Li et al. 2024 as modelopt 0.47 implements it: AWQ's pre_quant_scale, then the
singular value decomposition of the scaled weight. Here each candidate scale is evaluated with its
branch. Singular vectors come from subspace iteration, which is far faster than a full
decomposition; a direction that it misses is about as strong as the one that it returns instead. It
runs in float64, so that a branch rounded to 16 bit has the same bits for any number of threads.

Legend: O output features, K input features, R rank, N rows of a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_vlm_ptq.calibrate.losses import gram_matrix, row_chunks
from nemo_vlm_ptq.calibrate.solve.linear_scales import LowRank

OVERSAMPLING = 16  # directions iterated in addition to the requested rank
ITERATIONS = 8


def singular_vector_solver(
    weight_OK: torch.Tensor, rank: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function: pre_quant_scale [K] -> leading right singular vectors of weight / scale.

    The vectors are float64 [K,R]. The random start is fixed, and signs are chosen so that the
    largest entry of a vector is positive.
    """
    gram_KK = gram_matrix(weight_OK[rows].double() for rows in row_chunks(weight_OK.shape))
    width, generator = len(gram_KK), torch.Generator().manual_seed(0)
    shape = width, min(rank + OVERSAMPLING, width)
    start_KR = torch.randn(shape, generator=generator, dtype=torch.float64).to(gram_KK.device)

    def solve(pre_quant_scale_K: torch.Tensor) -> torch.Tensor:
        inverse_K1 = (1.0 / pre_quant_scale_K.double())[:, None]
        basis_KR = start_KR
        for _ in range(ITERATIONS):
            basis_KR = torch.linalg.qr(inverse_K1 * (gram_KK @ (inverse_K1 * basis_KR))).Q
        scaled_KR = inverse_K1 * basis_KR
        rotation_RR = torch.linalg.eigh(scaled_KR.T @ (gram_KK @ scaled_KR)).eigenvectors
        vectors_KR = (basis_KR @ rotation_RR).flip(1)[:, :rank]  # eigenvalues are ascending
        peak_R = vectors_KR.abs().argmax(dim=0)
        return torch.where(vectors_KR.gather(0, peak_R[None]) < 0, -vectors_KR, vectors_KR)

    return solve


def low_rank_factors(smooth_NK: torch.Tensor, vectors_KR: torch.Tensor) -> LowRank:
    """Return a [R,K] and b [N,R] in the weight's dtype; b a projects the weight on them."""
    b_NR = smooth_NK.double() @ vectors_KR
    return vectors_KR.T.to(smooth_NK.dtype).contiguous(), b_NR.to(smooth_NK.dtype)
