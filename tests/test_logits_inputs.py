"""Inputs of `logits` that do not suit the model are told in one line, before it is loaded."""

import shutil

import pytest
import torch
from bad_models import TINY, said_by, write_recipe
from safetensors.torch import save_file

from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.stages.logits import _parse_options
from nemo_vlm_ptq.stages.logits_inputs import read_inputs

IDS = torch.tensor([[0, 20, 30]])
IMAGE_IDS = torch.tensor([[0] + [3] * 64 + [20]])
PIXELS = torch.zeros(1, 3, 64, 64)
MASK = torch.ones(1, 3, dtype=torch.int64)
BAD = {
    "no ids": {"ids": IDS},
    "beyond": {"input_ids": torch.tensor([[0, 20, 512]])},
    "negative": {"input_ids": torch.tensor([[0, 20, -1]])},
    "far below": {"input_ids": torch.tensor([[0, 20, -(10**12)]])},
    "float": {"input_ids": IDS.float()},
    "bool": {"input_ids": IDS.bool()},
    "one row": {"input_ids": IDS[0]},
    "three axes": {"input_ids": IDS[None]},
    "empty": {"input_ids": IDS[:, :0]},
    "no rows": {"input_ids": IDS[:0]},
    "longer mask": {"input_ids": IDS, "attention_mask": torch.ones(1, 5, dtype=torch.int64)},
    "mask of a row": {"input_ids": IDS, "attention_mask": MASK[0]},
    "float mask": {"input_ids": IDS, "attention_mask": MASK.float()},
    "mask of twos": {"input_ids": IDS, "attention_mask": 2 * MASK},
    "smaller image": {"input_ids": IMAGE_IDS, "pixel_values": torch.zeros(1, 3, 56, 56)},
    "gray image": {"input_ids": IMAGE_IDS, "pixel_values": PIXELS[:, :1]},
    "rank": {"input_ids": IMAGE_IDS, "pixel_values": PIXELS[None]},
    "bytes": {"input_ids": IMAGE_IDS, "pixel_values": PIXELS.to(torch.uint8)},
    "NaN": {"input_ids": IMAGE_IDS, "pixel_values": PIXELS * float("nan")},
    "Inf": {"input_ids": IMAGE_IDS, "pixel_values": PIXELS + float("inf")},
    "no image": {"input_ids": IMAGE_IDS},
    "part of an image": {"input_ids": IMAGE_IDS[:, :30], "pixel_values": PIXELS},
    "unused image": {"input_ids": IDS, "pixel_values": PIXELS},
    "too many sizes": {
        "input_ids": IMAGE_IDS,
        "pixel_values": PIXELS,
        "image_sizes": torch.ones(2, 2, dtype=torch.int64),
    },
}


def plan_of(folder, model=TINY):
    return make_plan(load_recipe(str(write_recipe(folder, model, evaluate={"data": None}))))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("case", BAD)
def test_inputs_that_do_not_suit_the_model_are_refused(tmp_path, plan, case):
    save_file({name: one.contiguous() for name, one in BAD[case].items()}, tmp_path / "in")
    assert len(said_by(read_inputs, plan, tmp_path / "in")) < 500


def test_inputs_that_suit_the_model_are_read(tmp_path, plan):
    for ids in (IMAGE_IDS, IMAGE_IDS.int(), IMAGE_IDS.to(torch.int16)):
        mask = torch.ones_like(ids)
        tensors = {"input_ids": ids, "attention_mask": mask, "pixel_values": PIXELS.bfloat16()}
        save_file(tensors, tmp_path / "in")
        (sample,), (found,) = read_inputs(plan, tmp_path / "in")
        assert torch.equal(sample.input_ids, IMAGE_IDS[0]) and int(sample.is_image.sum()) == 64
        assert len(found) == len(IMAGE_IDS[0])


@pytest.mark.parametrize("case", ["negative", "far below", "beyond", "no image", "NaN"])
@pytest.mark.parametrize("family", ["phi", "vila"])
def test_inputs_of_other_families_are_checked(tmp_path, family, case):
    save_file(BAD[case], tmp_path / "in")
    if (family, case) == ("vila", "no image"):  # its image token is -200
        save_file({"input_ids": torch.tensor([[1, -200, 4]])}, tmp_path / "in")
    if (family, case) == ("phi", "no image"):
        save_file({"input_ids": torch.tensor([[1, -1, -1, 4]])}, tmp_path / "in")
    plan = plan_of(tmp_path, TINY.parent / f"tiny-{family}")
    assert len(said_by(read_inputs, plan, tmp_path / "in")) < 500


def test_files_of_another_format_are_named(tmp_path, plan):
    torch.save({"input_ids": IDS}, tmp_path / "in.pt")
    (tmp_path / "in.txt").write_text("0 20 30\n" * 10)
    (tmp_path / "empty").write_text("")
    for name in ("in.pt", "in.txt", "empty"):
        assert str(tmp_path / name) in said_by(read_inputs, plan, tmp_path / name)


def test_an_output_that_cannot_be_written_is_named_first(tmp_path):
    save_file({"input_ids": IDS}, tmp_path / "in")
    shutil.copy(tmp_path / "in", tmp_path / "file")
    for output in ("no/such/out", ".", "file/out", "x" * 300):
        options = {"from": "hf_source", "inputs": str(tmp_path / "in")}
        said = said_by(_parse_options, options | {"output": str(tmp_path / output)})
        assert said.startswith("output=")
