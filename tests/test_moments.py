"""Second moments: strips, exact sums, and what is written of them."""

import models
import pytest
import torch
from observing import observe_setup, plan_of
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.observe import reduction
from nemo_vlm_ptq.calibrate.observe.loop import observe
from nemo_vlm_ptq.calibrate.observe.observer import Observer
from nemo_vlm_ptq.calibrate.observe.records import ObserveOptions
from nemo_vlm_ptq.calibrate.second_moments import (
    accumulate_strip,
    assemble_strips,
    strip_to_float32,
    zero_strip,
)
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.distributed.moment_strips import strip_numel, strip_owner, strips

WIDTHS = (24, 512, 640, 1032, 4096, 11008)


def accumulate(micro_batches, width):
    """Return the second moment [K,K] of micro-batches [T,K], accumulated in their order."""
    parts = [zero_strip(width, i, torch.device("cpu")) for i in range(len(strips(width)))]
    for x_TK in micro_batches:
        for index, strip in enumerate(parts):
            accumulate_strip(strip, index, x_TK)
    return assemble_strips([strip_to_float32(strip) for strip in parts])


@pytest.mark.parametrize("width", WIDTHS)
def test_strips_cover_every_row_once(width):
    rows = [row for strip in strips(width) for row in range(strip.start, strip.stop)]
    assert rows == list(range(width))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_tensor_ranks_own_every_strip_once_and_are_balanced(width, T):
    numel_per_rank = [strip_numel(width, t, T) for t in range(T)]
    numel = sum((rows.stop - rows.start) * (width - rows.start) for rows in strips(width))
    assert sum(numel_per_rank) == numel <= width**2
    assert all(0 <= strip_owner(i, T) < T for i in range(len(strips(width))))
    if len(strips(width)) % (2 * T) == 0:
        assert len(set(numel_per_rank)) == 1


@pytest.mark.parametrize("width", [24, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_moment_is_the_sum_of_outer_products(width, dtype):
    torch.manual_seed(0)
    micro_batches = [torch.randn(7, width).to(dtype) for _ in range(5)]
    tokens = torch.cat(micro_batches).double()
    found = accumulate(micro_batches, width)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), tokens.T @ tokens, rtol=1e-5, atol=1e-4)


def test_the_second_moment_does_not_depend_on_the_order_of_micro_batches():
    torch.manual_seed(1)
    micro_batches = [torch.randn(5, 512) * 10 ** torch.randn(512) for _ in range(9)]
    assert torch.equal(accumulate(micro_batches, 512), accumulate(micro_batches[::-1], 512))


def test_a_layers_pending_files_are_as_many_as_half_of_the_memory_holds(tiny, monkeypatch):
    plan = plan_of(tiny.float32)
    with models.single_rank() as parallel:
        setup = observe_setup(parallel, plan)
        observer = Observer(setup.build_window(range(4)), parallel, range(4), ("whole",))
        numel = sum(2 * strip_numel(width, 0, 1) for width in (256, 256, 256, 512))
        for layers in (1, 2, 3):
            monkeypatch.setattr(reduction, "free_memory", lambda _, n=layers: 8 * n * (numel + 1))
            assert reduction._max_pending_files(observer, exact=False) == layers
            assert reduction._max_pending_files(observer, exact=True) == max(1, layers // 2)


@pytest.mark.parametrize("moments", [(), ("sketch",), ("whole",), ("sketch", "whole")])
def test_only_what_is_requested_is_written(tiny, tmp_path, moments):
    plan = plan_of(tiny.float32)
    samples = models.to_samples(models.random_questions([40] * 4, (0, 2), seed=5))
    with models.single_rank() as parallel:
        options = ObserveOptions(moments=moments)
        observe(observe_setup(parallel, plan), [samples], tmp_path, options, {})
    tensors = load_file(tmp_path / layer_file(3))
    found = {name.split(".")[1] for name in tensors}
    sketch = {"sketch", "blocks"} if "sketch" in moments else set()
    whole = {"moment"} if "whole" in moments else set()
    assert found == {"amax", "sum", "tokens"} | sketch | whole
