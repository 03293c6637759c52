"""What is observed, solved and exported is the same bytes on data, pipeline and tensor ranks."""

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.checkpoints.torch_dist_index import read_index
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_tensor
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.workdir.store import hash_file, read_manifest

LAYERS = range(4)
ONE = "1x1x1"
LAYOUTS = ["1x1x2", "1x2x1", "2x1x1"]  # TP x PP x DP


def main():
    """Ranks: FOLDER TPxPPxDP ..."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    layouts = [tuple(map(int, word.split("x"))) for word in words]
    for word, own in zip(words, models.each_layout(layouts), strict=True):
        models.run_line(own, folder / word)


def test_libraries_are_told_how_to_add_and_how_to_wait_before_torch_asks_them():
    names = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OMP_WAIT_POLICY")
    bare = {key: value for key, value in os.environ.items() if key not in names}
    code = (
        "import nemo_vlm_ptq, os, sys; print('torch' in sys.modules, *map(os.getenv, sys.argv[1:]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, *names], env=bare, capture_output=True, text=True
    )
    assert said.stdout.split() == ["False", "AUTO,STRICT", "AVX512_CORE_BF16", "PASSIVE"]


def digests(folder, names):
    return {name: hash_file(folder / name) for name in names}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_the_same_bytes(works, layout):
    names = [layer_file(layer) for layer in LAYERS]
    expected = digests(works[ONE] / "statistics", names)
    assert digests(works[layout] / "statistics", names) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_solved_scales_are_the_same_bytes(works, layout, name):
    names = [layer_file(layer) for layer in LAYERS]
    expected = digests(works[ONE] / name / "scales", names)
    assert digests(works[layout] / name / "scales", names) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name, row in FORMATS.items() for target in row.targets if target != "nemo"],
)
def test_exports_are_the_same_bytes(works, layout, name, target):
    found, expected = (read_manifest(works[key] / name / target) for key in (layout, ONE))
    assert found["files"] == expected["files"]
    assert any(file.endswith(".safetensors") for file in expected["files"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if "nemo" in row.targets])
def test_tensors_of_nemo_checkpoints_are_the_same(works, layout, name):
    """Ranks write files of their own; what lies in them is compared."""
    found, expected = (
        read_index(works[key] / name / "nemo" / "weights").tensors for key in (layout, ONE)
    )
    assert set(found) == set(expected) and len(expected) > 50
    for key, stored in expected.items():
        assert torch.equal(read_tensor(found[key]), read_tensor(stored)), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_tensors_of_quantized_megatron_checkpoints_are_the_same(works, layout, name):
    """Data ranks write layers of their own. Maxima of rows of gate and up lie rank by rank."""
    found, expected = (read_index(works[key] / name / "quantized").tensors for key in (layout, ONE))
    assert set(found) == set(expected) and len(expected) > 20
    for key, stored in expected.items():
        mine, theirs = read_tensor(found[key]), read_tensor(stored)
        if layout == "2x1x1" and "linear_fc1.weight_quantizer" in key and theirs.dim() > 1:
            halves = (half.chunk(2) for half in theirs.chunk(2))
            theirs = torch.cat([part for pair in zip(*halves, strict=True) for part in pair])
        assert torch.equal(mine, theirs), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_is_seen_by_one_data_rank(works, layout):
    facts = read_manifest(works[layout] / "statistics")["facts"]
    per_rank = facts["ids_per_rank"]
    assert len(per_rank) == int(layout[-1])
    together = [name for ids in per_rank for name in ids]
    alone = read_manifest(works[ONE] / "statistics")["facts"]["ids_per_rank"][0]
    assert len(together) == 12 and sorted(together) == sorted(alone)
