"""`verify DIR` of a whole export: its vision/ and its manifest."""

import shutil

import models
import pytest
import torch
from encoded_models import write_trtllm
from safetensors.torch import load_file, save_file
from test_cli import call
from test_contract import edit_config, encoded_model
from test_verify_folder import rank_file
from test_verify_folder_config import INFINITE

from nemo_vlm_ptq.verify.files import list_files
from nemo_vlm_ptq.workdir import store


@pytest.fixture
def checkpoint(tmp_path):
    """An fp8 checkpoint for two tensor-parallel ranks."""
    write_trtllm(tmp_path / "llm", encoded_model("fp8"), (2, 1), "fp8")
    return tmp_path / "llm"


@pytest.fixture
def whole(checkpoint):
    """The folder of an export: llm/, vision/ and a manifest."""
    folder = checkpoint.parent
    (folder / "vision").mkdir()
    save_file({"tower.weight": torch.ones(2, 2)}, folder / "vision" / "model.safetensors")
    (folder / "vision" / "config.json").write_text('{"vision_config": {"patch_size": 14}}')
    files = store.hash_files(folder, list_files(folder)[0])
    manifest = {"stage": "export", "settings": {}, "facts": {}, "files": files}
    store.write_json(folder / "manifest.json", manifest)
    return folder


def lose_vision_tensors(folder):
    save_file({}, folder / "vision" / "model.safetensors")


def spoil_vision(folder):
    save_file({"tower.weight": torch.full((2, 2), INFINITE)}, folder / "vision/model.safetensors")


def truncate_vision(folder):
    path = folder / "vision" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def lose_vision(folder):
    (folder / "vision" / "model.safetensors").unlink()


def spoil_vision_config(folder):
    (folder / "vision" / "config.json").write_text('{"vision_config": {"patch_size": Infinity}}')


def lose_vision_config(folder):
    (folder / "vision" / "config.json").unlink()


VISION_DAMAGES = {
    lose_vision_tensors: "vision/model.safetensors holds no tensors",
    spoil_vision: "vision/model.safetensors: tower.weight must hold finite numbers",
    truncate_vision: "vision/model.safetensors cannot be read: ",
    lose_vision: "vision/model.safetensors cannot be read: it is missing or no file",
    spoil_vision_config: "vision/config.json is not valid JSON: Infinity is not a JSON number",
    lose_vision_config: "vision/config.json cannot be read: ",
}


@pytest.mark.parametrize("damage", VISION_DAMAGES)
def test_damage_to_the_tower_is_found(whole, capsys, damage):
    (whole / "manifest.json").unlink()
    assert call(capsys, "verify", whole)[0] == 0
    damage(whole)
    code, out, err = call(capsys, "verify", whole)
    assert code == 3 and "vision  FAILED" in out and VISION_DAMAGES[damage] in err


@pytest.mark.parametrize("name", ["adapter_config.json", "llm/chat_template.jinja", "vision/x.bin"])
def test_a_file_that_an_export_does_not_list_is_found(whole, capsys, name):
    assert call(capsys, "verify", whole)[0] == 0
    (whole / name).write_text("{}")
    code, out, err = call(capsys, "verify", whole)
    assert code == 3 and "manifestFAILED" in out.replace(" ", "")
    assert f"manifest: {name} does not belong to the export; remove it" in err


def test_a_bit_of_an_export_that_was_changed_is_found_by_its_manifest(whole, capsys):
    path = rank_file(whole / "llm", 1)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    code, _, err = call(capsys, "verify", whole)
    assert code == 3 and "llm/rank1.safetensors was changed after it was written" in err


@pytest.fixture
def tower(checkpoint):
    """The folder of an export whose vision/ is that of the tiny LLaVA, and its tensors."""
    folder = checkpoint.parent / "vision"
    folder.mkdir()
    shutil.copy(models.TINY_LLAVA / "config.json", folder)
    tensors = load_file(models.TINY_LLAVA / models.WEIGHTS)
    tensors = {name: one for name, one in tensors.items() if not name.startswith("language_model")}
    save_file(tensors, folder / models.WEIGHTS)
    return checkpoint.parent, tensors


NORM = "vision_tower.vision_model.pre_layrnorm.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop(NORM), f"{NORM} is missing"),
        (lambda tensors: tensors.update(more=torch.ones(2)), "more is unexpected"),
        (
            lambda tensors: tensors.update({NORM: tensors[NORM][None].clone()}),
            f"{NORM} must have shape [128], got [1, 128]",
        ),
    ],
)
def test_the_tower_has_the_tensors_of_its_config(tower, capsys, change, expected):
    folder, tensors = tower
    assert call(capsys, "verify", folder)[0] == 0
    change(tensors)
    save_file(tensors, folder / "vision" / models.WEIGHTS)
    code, _, err = call(capsys, "verify", folder)
    assert code == 3 and f"vision: vision/model.safetensors: {expected}" in err


@pytest.mark.parametrize("layers", [10**12, -1, True, "5", None, 4])
def test_a_tower_of_another_depth_is_found_at_once(tower, capsys, layers):
    folder, _ = tower
    edit_config(folder / "vision", lambda c: c["vision_config"].update(num_hidden_layers=layers))
    assert call(capsys, "verify", folder)[0] == 3
