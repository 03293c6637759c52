"""Four ranks in every shape: data and pipeline leave the same bytes, tensors almost.

The model is in bfloat16. Tensor ranks add float32 parts of a sum in another order, which now and
then moves an activation by a step; two clip ratios of a group that are as good may then change
places.
"""

import sys
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.scales import divide
from nemo_vlm_ptq.calibrate.solve import load_scales, weight_names
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.numerics import encode
from nemo_vlm_ptq.store import hash_file, read_manifest

LAYERS = range(4)
NAMES = [name for name in FORMATS if name != "w4a8_awq"]  # it needs groups of 128: too wide at TP 4
SAME = ["1x1x4", "1x2x2"]
TENSOR = ["2x1x2", "4x1x1"]
EQUAL_CODES, OTHER_SCALES = 0.999, 0.015
ROUGH = "nvfp4_svdquant"  # its loss over the exponent has many small valleys
OTHER_ALPHAS = 3  # of 16, that may be another valley's


def calibrate(own, folder):
    """Import, observe and solve the little trained model, all formats but one."""
    from nemo_vlm_ptq.job import Job
    from nemo_vlm_ptq.plan import make_plan
    from nemo_vlm_ptq.recipe import Recipe
    from nemo_vlm_ptq.stages import run_stages

    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=str(folder),
        parallel=vars(own.layout),
        quantize={"format": tuple(NAMES), "group_size": 64},
        calibration={"data": "scenes", "samples": 32, "micro_batch": 4},
        export={"targets": ("trtllm", "hf")},
    )
    run_stages(Job(make_plan(recipe), own), models.STAGES[:3])


def main():
    """Ranks: FOLDER."""
    layouts = [tuple(map(int, word.split("x"))) for word in (*SAME, *TENSOR)]
    for word, own in zip((*SAME, *TENSOR), models.each_layout(layouts), strict=True):
        calibrate(own, Path(sys.argv[1]) / word)


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    """TPxPPxDP -> work folder."""
    folder = tmp_path_factory.mktemp("four")
    with models.alone() as own:
        calibrate(own, folder / "1x1x1")
    code, _, err = models.launch([*models.main_of("test_four_ranks"), folder], 4, timeout=900)
    assert code == 0, err[-20000:]
    return {word: folder / word for word in ("1x1x1", *SAME, *TENSOR)}


def digests(folder):
    return [hash_file(folder / layer_file(layer)) for layer in LAYERS]


@pytest.mark.parametrize("layout", SAME)
def test_data_and_pipeline_ranks_leave_the_same_bytes(works, layout):
    for part in ("statistics", *(f"{name}/scales" for name in NAMES)):
        assert digests(works[layout] / part) == digests(works["1x1x1"] / part), part


@pytest.mark.parametrize("layout", TENSOR)
@pytest.mark.parametrize("name", NAMES)
def test_tensor_ranks_choose_the_same_alphas(works, layout, name):
    found, expected = (
        {(line["layer"], line["linear"]): line["alpha"] for line in manifest["facts"]["layers"]}
        for manifest in (read_manifest(works[key] / name / "scales") for key in (layout, "1x1x1"))
    )
    assert len(expected) == 4 * len(LAYERS)
    others = sum(found[key] != alpha for key, alpha in expected.items())
    assert others <= (OTHER_ALPHAS if name == ROUGH else 0)


@pytest.mark.parametrize("layout", TENSOR)
@pytest.mark.parametrize("name", [name for name in NAMES if name != ROUGH])
def test_tensor_ranks_change_few_scales(works, layout, name):
    differ = total = 0
    for layer in LAYERS:
        found, expected = (
            load_file(works[key] / name / "scales" / layer_file(layer)) for key in (layout, "1x1x1")
        )
        for key, tensor in expected.items():
            differ += int((found[key] != tensor).sum())
            total += tensor.numel()
    assert differ <= OTHER_SCALES * total


@pytest.mark.parametrize("layout", TENSOR)
def test_tensor_ranks_change_hardly_any_int4_code(works, layout):
    reader, equal, total = LayerReader(works["1x1x1"] / "megatron"), 0, 0
    for layer in LAYERS:
        both = [load_scales(works[key] / "int4_awq" / "scales", layer) for key in (layout, "1x1x1")]
        names = weight_names(layer)
        for linear, weight in zip(names, reader.read(names.values()).values(), strict=True):
            own, other = (
                encode(divide(weight, one[linear].prequant), one[linear].weight_amax, "int4")
                for one in both
            )
            equal += int(torch.eq(own, other).sum())
            total += own.numel()
    print(f"{layout}: {equal / total:.5f} of the codes are equal")  # pytest -s
    assert equal >= EQUAL_CODES * total
