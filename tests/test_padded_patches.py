"""Images as padded patches: places of patches, and inputs of `logits`."""

import pytest
import torch
from bad_models import said_by, write_recipe
from processors import write_gemma4
from reference_gemma4 import CONFIG, IMAGE_TOKEN, PATCH
from safetensors.torch import save_file

from nemo_vlm_ptq.families import gemma4
from nemo_vlm_ptq.families.base import ImageInputs
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.stages.logits_inputs import read_inputs

IDS, WIDTH = torch.tensor([IMAGE_TOKEN]), 3 * PATCH**2
GRID = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [-1, -1]])  # a block of four, and padding
GOOD = {
    "input_ids": torch.tensor([[7, IMAGE_TOKEN, 8], [7, IMAGE_TOKEN, 9]]),
    "pixel_values": torch.rand(2, 5, WIDTH),
    "image_position_ids": GRID.repeat(2, 1, 1),
}
BAD = {
    "image_position_ids must be integers [2, 5, 2], got none": {"image_position_ids": None},
    "image_position_ids must be integers [2, 5, 2], got float32": {
        "image_position_ids": GOOD["image_position_ids"].float()
    },
    "image_position_ids must be integers [2, 5, 2], got int64 [2, 4, 2]": {
        "image_position_ids": GOOD["image_position_ids"][:, :4]
    },
    "pixel_values must be numbers [images,patches,C], got float32 [10, 48]": {
        "pixel_values": GOOD["pixel_values"].flatten(0, 1)
    },
    "pixel_values hold NaN or Inf": {"pixel_values": GOOD["pixel_values"] / 0},
    "patches must have 48 numbers, got 47": {"pixel_values": GOOD["pixel_values"][..., :47]},
    "row 0 of input_ids: videos are not supported": {
        "input_ids": torch.full((2, 3), CONFIG["video_token_id"])
    },
    "row 1 of input_ids: sounds are not supported": {
        "input_ids": torch.tensor([[7, IMAGE_TOKEN], [7, CONFIG["audio_token_id"]]])
    },
    "row 0 of input_ids: 3 image tokens, which is not the sum": {
        "input_ids": torch.full((1, 3), IMAGE_TOKEN)
    },
    "row 0 of input_ids: image_position_ids must be column and row": {
        "image_position_ids": 1 - GOOD["image_position_ids"]
    },
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    home = tmp_path_factory.mktemp("patches")
    write_gemma4(home / "model")
    recipe = write_recipe(home, home / "model", evaluate={"data": None})
    return make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))


def read(plan, folder, tensors):
    given = {name: one.contiguous() for name, one in tensors.items() if one is not None}
    save_file(given, folder / "inputs")
    return read_inputs(plan, folder / "inputs")


def test_each_row_of_logits_inputs_has_its_images(plan, tmp_path):
    samples, _ = read(plan, tmp_path, GOOD)
    for row, sample in enumerate(samples):
        assert torch.equal(sample.images.pixel_values[0], GOOD["pixel_values"][row])
        assert torch.equal(sample.images.patch_positions[0], GRID)
        assert sample.is_image.tolist() == [False, True, False]


@pytest.mark.parametrize("message", BAD)
def test_inputs_of_logits_that_do_not_suit_the_tower_are_refused(plan, tmp_path, message):
    assert message in said_by(read, plan, tmp_path, GOOD | BAD[message])


def test_places_of_patches_that_are_no_grid_are_refused():
    order = [0, 2, 1, 3, 4], [0, 1, 4, 2, 3], [0, 1, 2], [4]
    wrong = [*(GRID[one] for one in order), GRID + 1, 2 * GRID, GRID * 2**40]
    assert gemma4.find_placeholders(CONFIG, IDS, _images(GRID)).num_images == 1
    for places in wrong:
        said = said_by(gemma4.find_placeholders, CONFIG, IDS, _images(places))
        assert said.startswith("image_position_ids must be column and row of each patch")
    bare = ImageInputs(torch.zeros(1, 5, 48))
    assert "need image_position_ids" in said_by(gemma4.find_placeholders, CONFIG, IDS, bare)


def _images(places):
    return ImageInputs(torch.zeros(1, len(places), 48), patch_positions=places[None])
