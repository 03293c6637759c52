"""Image tokens against text tokens: whose error a search makes small.

An image brings hundreds of tokens and a question a dozen, so means over tokens as they came are
means over images. A share weighs the means of the two kinds; a search takes the share whose worse
served kind of tokens is served best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from nemo_vlm_ptq.calibrate.solve.scales import LinearScales
from nemo_vlm_ptq.calibrate.statistics import InputStatistics

IMAGE_SHARES = (None, 0.0, 0.25, 0.5, 0.75, 1.0)  # None: tokens as they came


def solve_with_image_share(
    statistics: InputStatistics,
    wish: float | Literal["search"] | None,
    solve_at: Callable[[float | None], LinearScales],
) -> LinearScales:
    """Scales of one linear at the share that is wished for.

    Args:
        statistics: of its input; where it has one kind of tokens, shares mean nothing.
        wish: share of image tokens, None as they came, or that it is searched.
        solve_at: share -> scales.
    """
    as_they_came = statistics.image_share
    if as_they_came is None:
        return solve_at(None)
    shares = IMAGE_SHARES if wish == "search" else (wish,)
    tried = [
        replace(solve_at(share), image_share=as_they_came if share is None else share)
        for share in shares
    ]
    return min(tried, key=_worse) if len(tried) > 1 else tried[0]


def _worse(scales: LinearScales) -> float:
    """The larger error of the two kinds of tokens."""
    assert scales.error_text is not None and scales.error_image is not None
    return max(scales.error_text, scales.error_image)
