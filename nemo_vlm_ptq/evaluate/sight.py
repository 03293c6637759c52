"""Sight test: answer the same questions with the images of other questions swapped in.

A model that uses its images loses accuracy with swapped images. A model whose vision path is broken
still answers fluently and, from language priors, often correctly, so its accuracy alone does not
reveal the damage. The test costs a second pass over all questions.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_vlm_ptq.data.questions import Question
from nemo_vlm_ptq.errors import UserError

MIN_GAP_SHARE = 0.5  # required share of the 16-bit model's gap between own and swapped images
MIN_GAP_POINTS = 5.0  # required gap in percentage points without a 16-bit result
VERDICT_SEES = "sees"
VERDICT_IGNORES_IMAGES = "ignores images"
VERDICT_BASELINE_IGNORES_IMAGES = "16 bit ignores images"


def swap_images(items: Sequence[Question]) -> dict[str, tuple[str, ...]]:
    """Return question id -> ids of other images, as many as the question has.

    An image is replaced by the same other one in all questions. The sorted image ids are rotated by
    half their number, so each image is used exactly once and the result is deterministic and
    independent of the order of the questions.

    Raises:
        UserError: all questions share one image.
    """
    images = sorted({name for item in items for name in item.images})
    if len(images) < 2:
        raise UserError(
            f"the sight test needs questions about at least 2 images, got {len(images)}; "
            "raise evaluate.limit or remove 'sight' from evaluate.tasks"
        )
    half = len(images) // 2
    other = dict(zip(images, images[half:] + images[:half], strict=True))
    return {item.id: tuple(other[name] for name in item.images) for item in items}


def uses_images(
    own: float,
    swapped: float,
    own_16bit: float | None = None,
    swapped_16bit: float | None = None,
) -> bool:
    """Return whether the gap own - swapped is large enough; all values are accuracies in percent.

    The gap must be above 0 and at least half of the 16-bit model's gap. Without a 16-bit result it
    must be at least 5 percentage points.
    """
    gap = own - swapped
    if own_16bit is None or swapped_16bit is None:
        return gap >= MIN_GAP_POINTS
    return gap > 0 and gap >= MIN_GAP_SHARE * (own_16bit - swapped_16bit)


def verdict(
    own: float,
    swapped: float,
    own_16bit: float | None = None,
    swapped_16bit: float | None = None,
) -> str:
    """Return one line: one of the VERDICT_* constants and the gaps in percentage points."""
    if uses_images(own, swapped, own_16bit, swapped_16bit):
        result = VERDICT_SEES
    elif own_16bit is None or swapped_16bit is None or own_16bit > swapped_16bit:
        result = VERDICT_IGNORES_IMAGES
    else:
        result = VERDICT_BASELINE_IGNORES_IMAGES
    line = f"{result}: own images add {own - swapped:.1f} points over swapped images"
    if own_16bit is None or swapped_16bit is None:
        return f"{line} (at least {MIN_GAP_POINTS:.0f} required)"
    gap_16bit = own_16bit - swapped_16bit
    if result == VERDICT_BASELINE_IGNORES_IMAGES:
        return (
            f"{line} (16 bit: {gap_16bit:.1f}; use questions that need the image in evaluate.data, "
            "or remove 'sight' from evaluate.tasks)"
        )
    return f"{line} (16 bit: {gap_16bit:.1f}, at least half required)"
