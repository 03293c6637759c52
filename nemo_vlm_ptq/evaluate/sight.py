"""Does the model still look? Ask the same questions over somebody else's images.

A model whose vision was damaged goes on talking and answers from habit, often rightly: accuracy
alone does not show it. What a model loses when the images are wrong does.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_vlm_ptq.data.questions import Question
from nemo_vlm_ptq.errors import UserError

SHARE = 0.5  # of the 16-bit model's gap that must be left
FLOOR = 5.0  # points that the gap must reach when no 16-bit model was asked
SEES, LOST, BLIND = "sees", "no longer looks", "blind in 16 bit"


def swap_images(items: Sequence[Question]) -> dict[str, str]:
    """Question id -> the image of another scene, the same for all questions of one image.

    The sorted images are turned half way round, so each is used exactly once as a stranger, and
    the result depends neither on chance nor on the order of the questions.

    Raises:
        UserError: all questions share one image.
    """
    images = sorted({item.image for item in items})
    if len(images) < 2:
        raise UserError(
            f"sight needs questions about at least 2 images, got {len(images)}; "
            "raise evaluate.limit or drop 'sight' from evaluate.tasks"
        )
    half = len(images) // 2
    other = dict(zip(images, images[half:] + images[:half], strict=True))
    return {item.id: other[item.image] for item in items}


def sees(
    normal: float,
    swapped: float,
    normal_16bit: float | None = None,
    swapped_16bit: float | None = None,
) -> bool:
    """Whether the model's own images still matter to it; all values are accuracies in percent.

    The gap normal - swapped must be above 0 and at least half of the 16-bit model's gap; without
    a 16-bit result it must be at least 5 points.
    """
    gap = normal - swapped
    if normal_16bit is None or swapped_16bit is None:
        return gap >= FLOOR
    return gap > 0 and gap >= SHARE * (normal_16bit - swapped_16bit)


def verdict(
    normal: float,
    swapped: float,
    normal_16bit: float | None = None,
    swapped_16bit: float | None = None,
) -> str:
    """One line: one of SEES, LOST and BLIND, and the gaps in points that say so."""
    if sees(normal, swapped, normal_16bit, swapped_16bit):
        word = SEES
    elif normal_16bit is None or swapped_16bit is None or normal_16bit > swapped_16bit:
        word = LOST
    else:
        word = BLIND
    line = f"{word}: its own images are worth {normal - swapped:.1f} points"
    if normal_16bit is None or swapped_16bit is None:
        return f"{line} ({FLOOR:.0f} needed)"
    given = normal_16bit - swapped_16bit
    if word == BLIND:
        return (
            f"{line} (16 bit: {given:.1f}, it does not look either; ask questions that need the "
            "image, evaluate.data, or drop 'sight' from evaluate.tasks)"
        )
    return f"{line} (16 bit: {given:.1f}, half of it needed)"
