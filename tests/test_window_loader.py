"""Windows are built one ahead of the one in use, in order, and errors reach the user."""

import threading

import pytest
import torch

from nemo_vlm_ptq.calibrate.observe.window_loader import WindowLoader

CPU = torch.device("cpu")
WINDOWS = [range(0, 2), range(2, 4), range(4, 5)]


def test_windows_are_built_in_order_and_one_ahead():
    built, ready = [], threading.Semaphore(0)

    def build(window):
        built.append(window)
        ready.release()
        return f"model {window.start}"

    with WindowLoader(build, WINDOWS, CPU) as loader:
        ready.acquire()
        assert built == WINDOWS[:1]
        for number, window in enumerate(WINDOWS, 1):
            assert loader.take() == f"model {window.start}"
            if number < len(WINDOWS):
                ready.acquire()
            assert built == WINDOWS[: number + 1]
        with pytest.raises(AssertionError, match="no window is left"):
            loader.take()


def test_an_error_is_raised_where_the_window_is_taken():
    def build(window):
        if window.start:
            raise ValueError("damaged")
        return window

    with WindowLoader(build, WINDOWS, CPU) as loader:
        assert loader.take() == WINDOWS[0]
        with pytest.raises(ValueError, match="damaged"):
            loader.take()


def test_no_window_is_kept_when_the_run_ends_early():
    with pytest.raises(KeyError), WindowLoader(list, WINDOWS, CPU) as loader:
        loader.take()
        raise KeyError
    assert loader._next is None


def test_without_windows_nothing_is_built():
    with WindowLoader(lambda _: pytest.fail("built"), [], CPU):
        pass
