"""Prefetching: results are in order, computed concurrently, and bounded in number."""

import threading

import pytest

from nemo_vlm_ptq.utils.prefetch import prefetch


def test_results_are_in_order_and_computed_concurrently_up_to_the_depth():
    barrier = threading.Barrier(3, timeout=60)
    started = []

    def square(item):
        started.append(item)
        if item < 3:
            barrier.wait()  # raises unless three threads arrive
        return item * item

    results = []
    for item, result in prefetch(range(8), square, 3):
        assert max(started) <= item + 3
        results.append((item, result))
    assert results == [(item, item * item) for item in range(8)]


def test_an_exception_is_raised_when_its_item_is_due():
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0, 2], lambda item: 1 // item, 3))


def test_no_items_give_no_results():
    assert list(prefetch([], str, 3)) == []
