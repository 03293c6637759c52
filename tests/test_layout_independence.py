"""Statistics, scales and exports have the same bytes on data, pipeline and tensor ranks."""

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
from nemo_vlm_ptq.targets.registry import supported_targets
from nemo_vlm_ptq.workdir.store import hash_file, read_manifest

LAYERS = range(4)
ONE_RANK = "1x1x1"
LAYOUTS = ["1x1x2", "1x2x1", "2x1x1"]  # TP x PP x DP
TORCH_DIST = ("megatron", "nemo")  # targets of which each rank writes its own files


def main():
    """Run all stages on the launched ranks; arguments: FOLDER TPxPPxDP ..."""
    folder, layouts = Path(sys.argv[1]), sys.argv[2:]
    sizes = [tuple(map(int, layout.split("x"))) for layout in layouts]
    for layout, parallel in zip(layouts, models.parallel_contexts(sizes), strict=True):
        models.run_all_stages(parallel, folder / layout)


def test_library_settings_for_reproducible_sums_are_set_before_torch_is_imported():
    names = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    code = (
        "import nemo_vlm_ptq, os, sys; print('torch' in sys.modules, *map(os.getenv, sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "AUTO,STRICT", "AVX512_CORE_BF16", "PASSIVE"]


def hash_files(folder, names):
    return {name: hash_file(folder / name) for name in names}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_have_the_same_bytes(works, layout):
    names = [layer_file(layer) for layer in LAYERS]
    expected = hash_files(works[ONE_RANK] / "statistics", names)
    assert hash_files(works[layout] / "statistics", names) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_scales_have_the_same_bytes(works, layout, name):
    names = [layer_file(layer) for layer in LAYERS]
    expected = hash_files(works[ONE_RANK] / name / "scales", names)
    assert hash_files(works[layout] / name / "scales", names) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name, fmt in FORMATS.items()
        for target in supported_targets(fmt)
        if target not in TORCH_DIST
    ],
)
def test_exports_have_the_same_bytes(works, layout, name, target):
    found, expected = (read_manifest(works[key] / name / target) for key in (layout, ONE_RANK))
    assert found["files"] == expected["files"]
    assert any(file.endswith(".safetensors") for file in expected["files"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", [name for name, fmt in FORMATS.items() if "nemo" in supported_targets(fmt)]
)
def test_nemo_checkpoints_hold_the_same_tensors(works, layout, name):
    """Each rank writes its own file, so tensors are compared instead of bytes."""
    found, expected = (
        read_index(works[key] / name / "nemo" / "weights").tensors for key in (layout, ONE_RANK)
    )
    assert set(found) == set(expected) and len(expected) > 50
    for key, stored in expected.items():
        assert torch.equal(read_tensor(found[key]), read_tensor(stored)), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_megatron_checkpoints_hold_the_same_tensors(works, layout, name):
    """Data ranks write different layers. The amax of gate and up is stored shard by shard."""
    found, expected = (
        read_index(works[key] / name / "quantized").tensors for key in (layout, ONE_RANK)
    )
    assert set(found) == set(expected) and len(expected) > 20
    for key, stored in expected.items():
        tensor, expected_tensor = read_tensor(found[key]), read_tensor(stored)
        is_fc1_amax = "linear_fc1.weight_quantizer" in key and expected_tensor.dim() > 1
        if layout == "2x1x1" and is_fc1_amax:
            gate, up = (half.chunk(2) for half in expected_tensor.chunk(2))
            expected_tensor = torch.cat([gate[0], up[0], gate[1], up[1]])
        assert torch.equal(tensor, expected_tensor), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_runs_on_one_data_rank(works, layout):
    ids_per_rank = read_manifest(works[layout] / "statistics")["facts"]["ids_per_rank"]
    assert len(ids_per_rank) == int(layout[-1])
    ids = [sample_id for rank_ids in ids_per_rank for sample_id in rank_ids]
    expected = read_manifest(works[ONE_RANK] / "statistics")["facts"]["ids_per_rank"][0]
    assert len(ids) == 12 and sorted(ids) == sorted(expected)
