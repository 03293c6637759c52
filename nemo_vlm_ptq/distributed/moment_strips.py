"""Partition of a symmetric second moment [K,K] into strips of rows.

Only the part of a strip from the diagonal rightwards is computed and stored. More strips save more
work, but a GPU is underused by a matrix product with few rows. Tensor ranks own whole strips.
"""

from __future__ import annotations

WIDE_INPUT_FEATURES = 8192  # inputs this wide are split into WIDE_INPUT_STRIPS
WIDE_INPUT_STRIPS = 8
NARROW_INPUT_STRIPS = 4
MIN_STRIP_ROWS = 64


def strips(width: int) -> list[slice]:
    """Return the rows of each strip of a [width,width] matrix.

    Return a single strip if `width` does not split evenly or strips would be too short.
    """
    count = WIDE_INPUT_STRIPS if width >= WIDE_INPUT_FEATURES else NARROW_INPUT_STRIPS
    height, remainder = divmod(width, count)
    if remainder or height < MIN_STRIP_ROWS:
        return [slice(0, width)]
    return [slice(start, start + height) for start in range(0, width, height)]


def strip_owner(index: int, T: int) -> int:
    """Return the tensor rank, of T, that owns strip `index`.

    Ranks are assigned in alternating order (0..T-1, T-1..0, ...), which balances long and short
    strips.
    """
    turn, place = divmod(index, T)
    return place if turn % 2 == 0 else T - 1 - place


def strip_numel(width: int, t: int, T: int) -> int:
    """Return the number of elements in the strips that tensor rank t of T owns.

    A strip holds its rows from the column of its first row onwards.
    """
    owned = [rows for i, rows in enumerate(strips(width)) if strip_owner(i, T) == t]
    return sum((rows.stop - rows.start) * (width - rows.start) for rows in owned)
