"""What is observed, solved and exported does not depend on how many ranks did it, or how.

Data and pipeline ranks leave the same bytes. Tensor ranks add the parts of a row-parallel output in
another order, and in bfloat16 they round each part before: from there on activations differ by a
few steps. So scales are compared at tensor 2 where the model is in float32, and in bfloat16 the
error that they make is.
"""

import sys
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.blocks import read_tensor
from nemo_vlm_ptq.calibrate.scales import change, divide, remainder
from nemo_vlm_ptq.calibrate.solve import load_scales, weight_names
from nemo_vlm_ptq.calibrate.statistics import layer_file, load_layer
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.store import hash_file, read_manifest
from nemo_vlm_ptq.torch_dist import read_index

LAYERS = range(4)
ONE, DATA, PIPELINE, TENSOR = "1x1x1", "1x1x2", "1x2x1", "2x1x1"
BF16_STEP = 2.0**-7  # largest relative distance of neighbours in bfloat16
WORSE = 1.05  # what rounding in tensor ranks may add to the error of a linear


def main():
    """Ranks: FOLDER TPxPPxDP[-float32] ..."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    layouts = [tuple(map(int, word.removesuffix("-float32").split("x"))) for word in words]
    for word, own in zip(words, models.each_layout(layouts), strict=True):
        if word.endswith("-float32"):
            models.run_line(own, folder / word, folder / "model32", models.STAGES[:3])
        else:
            models.run_line(own, folder / word)


def digests(folder, names):
    return {name: hash_file(folder / name) for name in names}


@pytest.mark.parametrize("layout", [DATA, PIPELINE])
def test_statistics_are_the_same_bytes(works, layout):
    names = [layer_file(layer) for layer in LAYERS]
    expected = digests(works[ONE] / "statistics", names)
    assert digests(works[layout] / "statistics", names) == expected


@pytest.mark.parametrize("layout", [DATA, PIPELINE])
@pytest.mark.parametrize("name", FORMATS)
def test_solved_scales_are_the_same_bytes(works, layout, name):
    names = [layer_file(layer) for layer in LAYERS]
    expected = digests(works[ONE] / name / "scales", names)
    assert digests(works[layout] / name / "scales", names) == expected


@pytest.mark.parametrize("layout", [DATA, PIPELINE])
@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name, row in FORMATS.items() for target in row.targets if target != "nemo"],
)
def test_exports_are_the_same_bytes(works, layout, name, target):
    found, expected = (read_manifest(works[key] / name / target) for key in (layout, ONE))
    assert found["files"] == expected["files"]
    assert any(file.endswith(".safetensors") for file in expected["files"])


@pytest.mark.parametrize("layout", [DATA, PIPELINE])
@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if "nemo" in row.targets])
def test_tensors_of_nemo_checkpoints_are_the_same(works, layout, name):
    """Ranks write files of their own; what lies in them is compared."""
    found, expected = (
        read_index(works[key] / name / "nemo" / "weights").tensors for key in (layout, ONE)
    )
    assert set(found) == set(expected) and len(expected) > 50
    for key, stored in expected.items():
        assert torch.equal(read_tensor(found[key]), read_tensor(stored)), key


def test_tensor_ranks_observe_the_same_bytes_before_the_first_sum_over_them(works):
    found, expected = (
        load_file(works[key] / "statistics" / layer_file(0)) for key in (TENSOR, ONE)
    )
    before = [
        key for key in expected if key.startswith(("linear_qkv", "linear_proj", "key", "val"))
    ]
    assert len(before) == 16
    assert all(torch.equal(found[key], expected[key]) for key in before)


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_ranks_choose_the_same_alphas_in_float32(works, name):
    found, expected = (
        {(line["layer"], line["linear"]): line["alpha"] for line in manifest["facts"]["layers"]}
        for manifest in (
            read_manifest(works[f"{key}-float32"] / name / "scales") for key in (TENSOR, ONE)
        )
    )
    assert len(expected) == 4 * len(LAYERS)
    assert found == expected


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_ranks_move_scales_by_less_than_a_step_in_float32(works, name):
    for layer in LAYERS:
        found, expected = (
            load_file(works[f"{key}-float32"] / name / "scales" / layer_file(layer))
            for key in (TENSOR, ONE)
        )
        assert set(found) == set(expected)
        for key in (key for key in expected if "low_rank" not in key):
            torch.testing.assert_close(found[key], expected[key], rtol=BF16_STEP, atol=0, msg=key)
        for key in (key for key in expected if key.endswith("low_rank_a")):  # may turn; b a is kept
            own, other = (one[key[:-1] + "b"] @ one[key] for one in (found, expected))
            assert float((own - other).norm() / other.norm()) < BF16_STEP, key


def error_of(weight, scales, row, moment):
    """sqrt of tr(dW H dW^T) of a linear with these scales."""
    left = remainder(divide(weight, scales.prequant), scales.branch)
    moved = change(weight, left, scales, row).double()
    return float(torch.trace(moved @ moment.double() @ moved.T).sqrt())


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_ranks_make_no_larger_error_in_bfloat16(works, name):
    reader = LayerReader(works[ONE] / "megatron")
    for layer in LAYERS:
        names = weight_names(layer)
        weights = reader.read(names.values())
        seen = load_layer(works[ONE] / "statistics", layer, torch.device("cpu"))
        found, expected = (
            load_scales(works[key] / name / "scales", layer) for key in (TENSOR, ONE)
        )
        for linear, full_name in names.items():
            given = (FORMATS[name], seen[linear].moment)
            own, other = (
                error_of(weights[full_name], scales[linear], *given) for scales in (found, expected)
            )
            assert own <= WORSE * other, (layer, linear)


@pytest.mark.parametrize("layout", [DATA, PIPELINE, TENSOR])
def test_every_sample_is_seen_by_one_data_rank(works, layout):
    facts = read_manifest(works[layout] / "statistics")["facts"]
    per_rank = facts["ids_per_rank"]
    assert len(per_rank) == int(layout[-1])
    together = [name for ids in per_rank for name in ids]
    alone = read_manifest(works[ONE] / "statistics")["facts"]["ids_per_rank"][0]
    assert len(together) == 12 and sorted(together) == sorted(alone)
