"""SVDQuant's branch: the strongest directions of a weight stay in 16 bit beside the rounded rest.

After Li et al. 2024, as modelopt 0.47 does it: AWQ's scale, then the singular value decomposition
of the scaled weight. Here the scale is searched with the branch in its place. The directions come
from subspace iteration, far faster than a decomposition of the whole; what it may miss of the last
of them is as strong as the next ones. In float64, so that a branch rounded to 16 bit has the same
bits whatever the number of threads.

Legend: O output features, K input features, R rank, N some rows of O.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_vlm_ptq.calibrate.losses import gram_matrix, row_chunks
from nemo_vlm_ptq.calibrate.solve.scales import LowRank

OVERSAMPLING, ITERATIONS = 16, 8  # directions iterated beside the wanted ones; iterations


def direction_finder(weight_OK: torch.Tensor, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Prequant scale [K] -> strongest right singular vectors of the weight divided by it.

    They are float64 [K,R]; the start is the same everywhere, and the largest entry of a direction
    is positive.
    """
    square_KK = gram_matrix(weight_OK[rows].double() for rows in row_chunks(weight_OK.shape))
    width, made = len(square_KK), torch.Generator().manual_seed(0)
    drawn = torch.randn(width, min(rank + OVERSAMPLING, width), generator=made, dtype=torch.float64)
    start_KR = drawn.to(square_KK.device)

    def directions(pre_quant_scale_K: torch.Tensor) -> torch.Tensor:
        back_K = (1.0 / pre_quant_scale_K.double())[:, None]
        found_KR = start_KR
        for _ in range(ITERATIONS):
            found_KR = torch.linalg.qr(back_K * (square_KK @ (back_K * found_KR))).Q
        scaled_KR = back_K * found_KR
        within = torch.linalg.eigh(scaled_KR.T @ (square_KK @ scaled_KR)).eigenvectors
        best_KR = (found_KR @ within).flip(1)[:, :rank]
        peak_R = best_KR.abs().argmax(dim=0)[None]
        return torch.where(best_KR.gather(0, peak_R) < 0, -best_KR, best_KR)

    return directions


def low_rank_factors(smooth_NK: torch.Tensor, directions_KR: torch.Tensor) -> LowRank:
    """a [R,K] and b [N,R], in the weight's dtype: b a is the weight along the directions."""
    b_NR = smooth_NK.double() @ directions_KR
    return directions_KR.T.to(smooth_NK.dtype).contiguous(), b_NR.to(smooth_NK.dtype)
