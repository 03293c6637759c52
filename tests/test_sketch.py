"""Sketches of a linear's input: rows of tokens, exact sums, and the loss that they estimate."""

import pytest
import torch
from solving import GROUP_SIZE, SHAPES, SIZES, make_tokens, make_weights, observe_tokens

from nemo_vlm_ptq.calibrate.second_moments import MOMENT_UNIT
from nemo_vlm_ptq.calibrate.sketch import (
    SKETCH_UNIT,
    accumulate_blocks,
    accumulate_sketch,
    assign_tokens,
    block_features,
    zero_blocks,
)
from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, solve_layer
from nemo_vlm_ptq.calibrate.solve.scales import with_errors
from nemo_vlm_ptq.formats import FORMATS

CPU = torch.device("cpu")


def random_modality(samples, length, seed=0):
    """Return [B,S] with all three values, padding at the end of the samples."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.randint(1, 3, (samples, length), generator=generator)
    lengths = torch.randint(1, length + 1, (samples, 1), generator=generator)
    return torch.where(torch.arange(length) < lengths, modality, 0).to(torch.int8)


def test_every_token_has_one_row_of_its_modality_whatever_batch_it_is_in():
    modality, ids = random_modality(4, 30), ["a", "b", "c", "d"]
    rows_of = {}
    for batch in ([0, 1, 2, 3], [2, 0], [3]):
        tokens = assign_tokens([ids[i] for i in batch], modality[batch], 8, CPU)
        assert tokens.starts[0] == 0 and tokens.starts[-1] == len(tokens.order)
        for row in range(16):
            part = slice(tokens.starts[row], tokens.starts[row + 1])
            assert tokens.order[part].tolist() == sorted(tokens.order[part].tolist())
            for token, sign in zip(tokens.order[part], tokens.signs[part], strict=True):
                position, sample = divmod(int(token), len(batch))
                key = ids[batch[sample]], position
                assert rows_of.setdefault(key, (row, float(sign))) == (row, float(sign))
                assert row // 8 == modality[batch[sample], position] - 1
    assert len(rows_of) == int((modality != 0).sum())
    assert {sign for _, sign in rows_of.values()} == {1.0, -1.0}


def test_rows_and_signs_are_spread_evenly():
    tokens = assign_tokens(["x"], torch.ones(1, 20_000, dtype=torch.int8), 16, CPU)
    counts = tokens.starts.diff()[:16]
    assert counts.min() > 1100 and counts.max() < 1400
    assert abs(float(tokens.signs.mean())) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_signed_tokens_and_do_not_depend_on_order(dtype):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(5):
        ids = [f"{number} {i}" for i in range(3)]
        x_TK = torch.randn(60, 24, generator=generator) * 10.0 ** torch.randn(24)
        batches.append((ids, random_modality(3, 20, number), x_TK.to(dtype)))

    def sketch(order):
        total = torch.zeros(16, 24, dtype=torch.float64)
        for ids, modality, x_TK in order:
            accumulate_sketch(total, x_TK, assign_tokens(ids, modality, 8, CPU))
        return total

    found = sketch(batches)
    assert torch.equal(found, sketch(batches[::-1]))
    expected = torch.zeros(16, 24, dtype=torch.float64)
    for ids, modality, x_TK in batches:
        tokens = assign_tokens(ids, modality, 8, CPU)
        row = torch.repeat_interleave(torch.arange(16), tokens.starts.diff())
        signed = x_TK[tokens.order].double() * tokens.signs[:, None]
        expected.index_add_(0, row, signed)
    torch.testing.assert_close(found * SKETCH_UNIT, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "features"), [(24, 8), (96, 32), (128, 128), (640, 128)])
def test_blocks_are_the_diagonal_of_the_second_moment(width, features):
    assert block_features(width) == features
    x_TK = torch.randn(50, width, generator=torch.Generator().manual_seed(2))
    modality = torch.arange(50).remainder(3)
    blocks = zero_blocks(width, CPU)
    accumulate_blocks(blocks, x_TK[:20], modality[:20])
    accumulate_blocks(blocks, x_TK[20:], modality[20:])
    for row in range(2):
        tokens = x_TK[modality == row + 1].double()
        whole = tokens.T @ tokens
        for index, block in enumerate(blocks[row] * MOMENT_UNIT):
            part = slice(index * features, (index + 1) * features)
            torch.testing.assert_close(block, whole[part, part], rtol=1e-4, atol=1e-3)


def test_the_estimated_loss_is_unbiased_and_close(tmp_path):
    """Errors are those of the whole second moment within the spread of 512 rows."""
    estimated, whole = (observe_tokens(tmp_path, whole=flag)[0] for flag in (False, True))
    for linear, weight in make_weights().items():
        delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        for modality in ("text", "image"):
            found = float(estimated[linear].moments[modality].loss([delta]))
            expected = float(whole[linear].moments[modality].loss([delta]))
            assert found == pytest.approx(expected, rel=0.1), (linear, modality)


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq", "nvfp4_awq"])
def test_a_search_with_a_sketch_loses_little_against_one_with_whole_moments(name, tmp_path):
    fmt, weights = FORMATS[name], make_weights()
    counts = {"text": 2000, "image": 3000}
    estimated, whole = (observe_tokens(tmp_path, counts, whole=flag)[0] for flag in (False, True))
    solved = [
        solve_layer(weights, statistics, fmt, GROUP_SIZE, SIZES, SolveOptions())
        for statistics in (estimated, whole)
    ]
    losses = {
        linear: [
            with_errors(scales[linear], weights[linear], whole[linear], fmt).error ** 2
            for scales in solved
        ]
        for linear in SHAPES
    }
    for linear, (found, best) in losses.items():
        assert found <= 1.03 * best, linear
    assert make_tokens(8).keys() == counts.keys()
