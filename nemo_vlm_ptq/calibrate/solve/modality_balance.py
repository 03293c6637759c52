"""Balance between text and image tokens in the loss that a search minimizes.

An image has hundreds of tokens and a question a dozen, so unweighted means are dominated by image
tokens. An image share reweights the means of the two modalities. A search over shares keeps the one
whose worse modality has the smallest error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.calibrate.statistics import InputStatistics

IMAGE_SHARES = (None, 0.0, 0.25, 0.5, 0.75, 1.0)  # None: the share in the calibration data


def solve_with_image_share(
    statistics: InputStatistics,
    image_share: float | Literal["search"] | None,
    solve: Callable[[float | None], LinearScales],
) -> LinearScales:
    """Return the scales of one linear at the requested image share.

    Args:
        statistics: of its input. If a modality has no tokens, the share has no effect.
        image_share: weight of image tokens, None for their share in the calibration data, or
            "search".
        solve: image share -> scales.
    """
    observed_share = statistics.image_share
    if observed_share is None:
        return solve(None)
    shares = IMAGE_SHARES if image_share == "search" else (image_share,)
    candidates = [
        replace(solve(share), image_share=observed_share if share is None else share)
        for share in shares
    ]
    return min(candidates, key=_worst_error) if len(candidates) > 1 else candidates[0]


def _worst_error(scales: LinearScales) -> float:
    """Return the larger of the errors over text and over image tokens."""
    assert scales.error_text is not None and scales.error_image is not None
    return max(scales.error_text, scales.error_image)
