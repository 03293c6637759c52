"""Work done ahead: in order, side by side, and no further than was asked for."""

import threading

import pytest

from nemo_vlm_ptq.utils.prefetch import prefetch


def test_items_come_in_order_and_as_many_as_asked_for_are_made_side_by_side():
    together = threading.Barrier(3, timeout=60)
    begun = []

    def make(item):
        begun.append(item)
        if item < 3:
            together.wait()  # passed by three at once, or broken
        return item * item

    seen = []
    for item, made in prefetch(range(8), make, 3):
        assert max(begun) <= item + 3
        seen.append((item, made))
    assert seen == [(item, item * item) for item in range(8)]


def test_what_fails_is_raised_where_its_turn_comes():
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0, 2], lambda item: 1 // item, 3))


def test_nothing_comes_of_nothing():
    assert list(prefetch([], str, 3)) == []
