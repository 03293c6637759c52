"""Second moments: strips, exact sums, and passes over the data under a memory limit."""

import models
import pytest
import torch
from bad_models import write_recipe

from nemo_vlm_ptq.calibrate.observe import loop, reduction
from nemo_vlm_ptq.calibrate.observe.loop import ObserveOptions, ObserveSetup, observe
from nemo_vlm_ptq.calibrate.second_moments import (
    accumulate_strip,
    assemble_strips,
    strip_to_float32,
    zero_strip,
)
from nemo_vlm_ptq.calibrate.statistics import layer_file, load_layer
from nemo_vlm_ptq.distributed.moment_strips import strip_numel, strip_owner, strips
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import hash_file

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


def observe_tiny(parallel, tiny, folder, max_memory, reserved_memory=0):
    """Observe the tiny random model; return (passes, file name -> sha256).

    A `max_memory` of 0 means without second moments.
    """
    from rank_parity import import_llava

    folder.mkdir()
    model, vision = import_llava(parallel, tiny.float32)
    samples = models.to_samples(models.random_questions([40] * 4, (0, 2), seed=5))
    result = observe(
        ObserveSetup(model, vision, parallel, models.identity_preprocess),
        [samples[:2], samples[2:]],
        folder,
        ObserveOptions(
            second_moments=max_memory != 0,
            max_memory=max_memory,
            reserved_memory=reserved_memory,
        ),
        {},
    )
    return len(result.passes), {name: hash_file(folder / name) for name in result.files}


@pytest.fixture(scope="module")
def layer_bytes():
    """Bytes of the second moments of one layer of the tiny model."""
    return 2 * 8 * sum(strip_numel(width, 0, 1) for width in (256, 256, 256, 512))


def test_several_passes_write_the_same_bytes_as_one(tiny, tmp_path, layer_bytes, capsys):
    with models.single_rank() as parallel:
        passes_of_one, expected = observe_tiny(parallel, tiny, tmp_path / "one", None)
        assert "passes" not in "".join(capsys.readouterr())
        passes_of_two, found = observe_tiny(parallel, tiny, tmp_path / "two", 3 * layer_bytes)
    log = "".join(capsys.readouterr())
    assert "observe: 2 passes over the data: second moments of one layer take " in log
    assert (passes_of_one, passes_of_two) == (1, 2)
    assert found == expected and set(expected) == {layer_file(layer) for layer in range(4)}


def test_free_memory_limits_layers_per_pass_and_pending_files(
    tiny, tmp_path, layer_bytes, monkeypatch
):
    reserved_memory, limits = 10 * layer_bytes, []
    max_pending_files = reduction._max_pending_files

    def record_limit(*args):
        limits.append(max_pending_files(*args))
        return limits[-1]

    with models.single_rank() as parallel:
        _, expected = observe_tiny(parallel, tiny, tmp_path / "one", None)
        monkeypatch.setattr(loop, "free_memory", lambda _: reserved_memory + 4 * layer_bytes)
        monkeypatch.setattr(reduction, "free_memory", lambda _: 2 * layer_bytes)
        monkeypatch.setattr(reduction, "_max_pending_files", record_limit)
        passes, found = observe_tiny(parallel, tiny, tmp_path / "two", None, reserved_memory)
    assert passes == 2  # 0.9 of four layers fit
    assert limits == [2, 2, 2, 2]  # half of the free memory; float32 files are half as large
    assert found == expected


def test_memory_for_less_than_one_layer_is_an_error(tiny, tmp_path, layer_bytes):
    with models.single_rank() as parallel, pytest.raises(UserError) as error:
        observe_tiny(parallel, tiny, tmp_path / "statistics", layer_bytes - 1)
    needed = f"second moments of one layer take {layer_bytes / 1e6:.1f} MB per rank"
    assert needed in str(error.value) and "max_statistics_memory" in str(error.value)


def test_second_moments_are_written_only_if_requested(tiny, tmp_path):
    with models.single_rank() as parallel:
        observe_tiny(parallel, tiny, tmp_path / "statistics", 0)
    for statistics in load_layer(tmp_path / "statistics", 3, torch.device("cpu")).values():
        assert statistics.second_moment is None and float(statistics.amax.max()) > 0


def test_max_statistics_memory_accepts_a_unit(tmp_path):
    path = write_recipe(tmp_path, models.TINY_LLAVA)
    recipe = load_recipe(str(path), ["calibration.max_statistics_memory=40GB"])
    assert recipe.calibration.max_statistics_memory == 40_000_000_000
    assert load_recipe(str(path)).calibration.max_statistics_memory is None
