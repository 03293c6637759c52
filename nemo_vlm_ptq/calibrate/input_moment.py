"""Second moment of a linear's input, and the output loss of a weight change that it gives.

The mean over tokens of |x dW^T|^2 equals tr(dW E[x x^T] dW^T): the number that replaying all tokens
gives, at a cost that does not depend on the number of tokens.

Legend: O output features, K input features, N rows of a weight, M rows of a root, G blocks of g.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from nemo_vlm_ptq.calibrate.losses import allow_tf32


@dataclass(frozen=True, kw_only=True)
class InputMoment:
    """Mean of x x^T: whole, or a root R of M rows with E[x x^T] ~ R^T R, from a sketch.

    root_MK: float32, or None.
    whole_KK: float32, or None; one of the two is set.
    blocks_Ggg: float32, exact diagonal blocks.
    """

    root_MK: torch.Tensor | None = None
    whole_KK: torch.Tensor | None = None
    blocks_Ggg: torch.Tensor

    def row_losses(self, delta_NK: torch.Tensor) -> torch.Tensor:
        """Return dw E[x x^T] dw^T of each row dw, float64 [N]."""
        with allow_tf32():
            if self.root_MK is not None:
                return (delta_NK @ self.root_MK.T).square_().sum(dim=1).double()
            assert self.whole_KK is not None
            product = delta_NK @ self.whole_KK
        return product.mul_(delta_NK).sum(dim=1).double()

    def loss(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return tr(D E[x x^T] D^T), float64 [], of a matrix D given as chunks of rows."""
        return torch.stack([self.row_losses(part_NK).sum() for part_NK in parts]).sum()


def mix_moments(moments: Sequence[InputMoment], shares: Sequence[float]) -> InputMoment:
    """Return the weighted mean of second moments of the same kind; shares add up to 1."""
    pairs = [(moment, share) for moment, share in zip(moments, shares, strict=True) if share]
    if len(pairs) == 1:
        return pairs[0][0]
    blocks = torch.stack([moment.blocks_Ggg * share for moment, share in pairs]).sum(dim=0)
    roots = [one.root_MK * share**0.5 for one, share in pairs if one.root_MK is not None]
    if roots:
        return InputMoment(root_MK=torch.cat(roots), blocks_Ggg=blocks)
    wholes = [one.whole_KK * share for one, share in pairs if one.whole_KK is not None]
    return InputMoment(whole_KK=torch.stack(wholes).sum(dim=0), blocks_Ggg=blocks)


def diagonal_blocks(matrix_KK: torch.Tensor, features: int) -> torch.Tensor:
    """Return the diagonal blocks [K/g,g,g] of a matrix, g features each."""
    pairs = matrix_KK.unflatten(1, (-1, features)).unflatten(0, (-1, features))
    return pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
