"""Second moments in strips: what they hold, who keeps them, and that order leaves no trace."""

import models
import pytest
import torch
from bad_models import write_recipe

from nemo_vlm_ptq.calibrate import second_moments as moments
from nemo_vlm_ptq.calibrate.observe import loop as observing
from nemo_vlm_ptq.calibrate.observe import reduction as collect
from nemo_vlm_ptq.calibrate.observe.loop import ObserveOptions, ObserveSetup, observe
from nemo_vlm_ptq.calibrate.statistics import layer_file, load_layer
from nemo_vlm_ptq.distributed.layout import strip_entries, strip_owner, strips
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import hash_file

WIDTHS = (24, 512, 640, 1032, 4096, 11008)


def gathered(batches, width):
    """The whole moment of micro-batches [T,K], taken in one after the other."""
    kept = [moments.zeros(width, i, torch.device("cpu")) for i in range(len(strips(width)))]
    for x_TK in batches:
        for index, strip in enumerate(kept):
            moments.accumulate(strip, index, x_TK)
    return moments.assemble([moments.to_float32(strip) for strip in kept])


@pytest.mark.parametrize("width", WIDTHS)
def test_strips_cover_every_row_once(width):
    rows = [row for one in strips(width) for row in range(one.start, one.stop)]
    assert rows == list(range(width))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_tensor_ranks_keep_every_strip_once_and_about_as_much(width, T):
    shares = [strip_entries(width, t, T) for t in range(T)]
    whole = sum((one.stop - one.start) * (width - one.start) for one in strips(width))
    assert sum(shares) == whole <= width**2
    assert all(0 <= strip_owner(i, T) < T for i in range(len(strips(width))))
    if len(strips(width)) % (2 * T) == 0:
        assert len(set(shares)) == 1


@pytest.mark.parametrize("width", [24, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moment_is_the_sum_of_outer_products(width, dtype):
    torch.manual_seed(0)
    batches = [torch.randn(7, width).to(dtype) for _ in range(5)]
    every = torch.cat(batches).double()
    found = gathered(batches, width)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), every.T @ every, rtol=1e-5, atol=1e-4)


def test_the_order_of_micro_batches_leaves_no_trace():
    torch.manual_seed(1)
    batches = [torch.randn(5, 512) * 10 ** torch.randn(512) for _ in range(9)]
    assert torch.equal(gathered(batches, 512), gathered(batches[::-1], 512))


def one_line(own, tiny, folder, limit, working=0):
    """(passes, hashes) of the tiny random model's statistics, with room for `limit` bytes."""
    from rank_parity import import_llava

    folder.mkdir()
    model, vision = import_llava(own, tiny.float32)
    samples = models.to_samples(models.random_questions([40] * 4, (0, 2), seed=5))
    work, chunks = ObserveSetup(model, vision, own, models.ready), [samples[:2], samples[2:]]
    run = observe(work, chunks, folder, ObserveOptions(limit != 0, limit, working), {})
    return len(run.passes), {name: hash_file(folder / name) for name in run.files}


@pytest.fixture(scope="module")
def layer_bytes():
    """What the second moments of one layer of the tiny model take."""
    return 2 * 8 * sum(strip_entries(width, 0, 1) for width in (256, 256, 256, 512))


def test_passes_over_fewer_layers_leave_the_same_bytes(tiny, tmp_path, layer_bytes, capsys):
    with models.alone() as own:
        once, whole = one_line(own, tiny, tmp_path / "whole", None)
        assert "passes" not in "".join(capsys.readouterr())
        twice, cut = one_line(own, tiny, tmp_path / "cut", 3 * layer_bytes)
    said = "".join(capsys.readouterr())
    assert "observe: 2 passes over the data: second moments of one layer take " in said
    assert (once, twice) == (1, 2)
    assert cut == whole and set(whole) == {layer_file(layer) for layer in range(4)}


def test_what_is_free_says_how_many_layers_fit_and_how_many_wait_to_be_written(
    tiny, tmp_path, layer_bytes, monkeypatch
):
    working, waiting = 10 * layer_bytes, []
    real = collect._at_once

    def at_once(*given):
        waiting.append(real(*given))
        return waiting[-1]

    with models.alone() as own:
        _, whole = one_line(own, tiny, tmp_path / "whole", None)
        monkeypatch.setattr(observing, "free_memory", lambda _: working + 4 * layer_bytes)
        monkeypatch.setattr(collect, "free_memory", lambda _: 2 * layer_bytes)
        monkeypatch.setattr(collect, "_at_once", at_once)
        passes, cut = one_line(own, tiny, tmp_path / "cut", None, working)
    assert passes == 2  # 0.9 of four layers
    assert waiting == [2, 2, 2, 2]  # half of what is free; in float32 a layer is half as large
    assert cut == whole


def test_room_for_less_than_a_layer_is_refused_with_what_it_takes(tiny, tmp_path, layer_bytes):
    with models.alone() as own, pytest.raises(UserError) as caught:
        one_line(own, tiny, tmp_path / "work", layer_bytes - 1)
    needed = f"second moments of one layer take {layer_bytes / 1e6:.1f} MB on a rank"
    assert needed in str(caught.value) and "max_statistics_memory" in str(caught.value)


def test_without_second_moments_none_are_written(tiny, tmp_path):
    with models.alone() as own:
        one_line(own, tiny, tmp_path / "work", 0)
    seen = load_layer(tmp_path / "work", 3, torch.device("cpu"))
    assert all(one.moment is None and float(one.amax.max()) > 0 for one in seen.values())


def test_the_recipe_takes_bytes_with_a_unit(tmp_path):
    recipe = write_recipe(tmp_path, models.TINY_LLAVA)
    made = load_recipe(str(recipe), ["calibration.max_statistics_memory=40GB"])
    assert made.calibration.max_statistics_memory == 40_000_000_000
    assert load_recipe(str(recipe)).calibration.max_statistics_memory is None
