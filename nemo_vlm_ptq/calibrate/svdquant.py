"""SVDQuant's branch: the strongest directions of a weight stay in 16 bit beside the rounded rest.

After Li et al. 2024, as modelopt 0.47 does it: AWQ's scale first, then the singular value
decomposition of the scaled weight.

Legend: O output features, K input features, R rank.
"""

from __future__ import annotations

import torch

from nemo_vlm_ptq.calibrate.scales import Branch


def low_rank(smooth_OK: torch.Tensor, rank: int) -> Branch:
    """The nearest matrix b a of some rank, as a [R,K] and b [O,R] in the weight's dtype.

    From the eigenvectors of the smaller of W^T W and W W^T in float32, which is exact enough for
    the largest ones. The largest entry of each row of a is positive, so that signs are settled.
    """
    weight_OK = smooth_OK.float()
    tall = len(weight_OK) >= weight_OK.shape[1]
    square = weight_OK.T @ weight_OK if tall else weight_OK @ weight_OK.T
    vectors = torch.linalg.eigh(square).eigenvectors[:, -rank:].flip(1)
    if tall:
        a_RK, b_OR = vectors.T, weight_OK @ vectors
    else:
        a_RK = torch.nn.functional.normalize(vectors.T @ weight_OK, dim=1)
        b_OR = weight_OK @ a_RK.T
    peak = a_RK.abs().argmax(dim=1, keepdim=True)
    sign_R1 = torch.where(a_RK.gather(1, peak) < 0, -1.0, 1.0)
    return (a_RK * sign_R1).to(smooth_OK.dtype), (b_OR * sign_R1.T).to(smooth_OK.dtype)
