"""Model folders with one thing wrong, recipes for them, and the command's one line about them."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from nemo_vlm_ptq import cli
from nemo_vlm_ptq.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny-llava"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "nemo-vlm-ptq: error: "
PATIENCE = 300  # seconds that a command may take on a busy machine
LLAVA_7B = {  # what config.json of llava-1.5-7b-hf changes of the defaults of transformers
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "tie_word_embeddings": False,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "tie_word_embeddings": False},
}


def said_by(action: Callable[..., object], *arguments: object) -> str:
    """What an action rejects with, one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    said = str(caught.value)
    assert said and "\n" not in said
    return said


def copy_model(folder: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(TINY, folder))


def damage(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The folder, with its tensors changed in place by `change`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def configure(folder: Path, values: Mapping[str, Any]) -> Path:
    """The folder, with dotted keys of its config.json set."""
    config = json.loads((folder / "config.json").read_text())
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        part = config
        for key in parents:
            part = part[key]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hollow_model(folder: Path, config: Mapping[str, Any]) -> Path:
    """A model of any size whose weight file is a header and a hole that takes no disk."""
    from nemo_vlm_ptq.families import find_family

    folder.mkdir()
    family = find_family(dict(config))
    header, end = {}, 0
    decoder = family.decoder(config)
    shapes = decoder.shapes(family.parameter_map(decoder)) | family.vision_shapes(config)
    for name, shape in shapes.items():
        start, size = end, 2
        for width in shape:
            size *= width
        end = start + size
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def askable(model: Path) -> Path:
    """A LLaVA of any size with the small model's tokenizer, and images of its tower's size."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (TINY, model)]
    side = configs[1].get("vision_config", {}).get("image_size", 336)  # transformers' default
    for path in TINY.glob("*token*.json"):
        shutil.copy(path, model)
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    settings |= {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    return configure(model, {"image_token_index": configs[0]["image_token_index"]})


def write_recipe(folder: Path, model: Path | str = TINY, **keys: Any) -> Path:
    """Write a recipe that works in `folder`/work, on the drawn scenes unless `keys` say more."""
    tree: dict[str, Any] = {"model": str(model), "workdir": str(folder / "work")}
    defaults = {
        "calibration": {"data": "scenes"},
        "evaluate": {"data": "scenes"},
        "export": {"targets": ["trtllm", "hf"]},
    }
    for key in (*defaults, *keys):
        default, value = defaults.get(key, {}), keys.get(key, {})
        tree[key] = default | value if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def error_message(*words: Path | str) -> str:
    """What the command says in its one line on stderr, having ended with exit code 2."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["nemo-vlm-ptq", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    assert (stopped.value.code, out.getvalue()) == (2, ""), err.getvalue()
    line = err.getvalue()
    assert line.startswith(PREFIX) and line.endswith("\n") and line.count("\n") == 1, line
    return line.removeprefix(PREFIX).rstrip("\n")


def plan_error(folder: Path, model: Path | str = TINY, *overrides: str) -> str:
    """What `plan` says of a model; nothing has been written."""
    said = error_message("plan", write_recipe(folder, model), *overrides)
    assert not (folder / "work").exists()
    return said


@dataclass(frozen=True)
class Command:
    """A command in processes of its own, and the folder of its recipe."""

    process: subprocess.Popen[bytes]
    folder: Path

    def end(self) -> tuple[int, list[str]]:
        """Exit code and the lines on stderr, when it has ended."""
        code = self.process.wait(timeout=PATIENCE)
        return code, (self.folder / "stderr").read_text().splitlines()


@contextlib.contextmanager
def running(folder: Path, *words: Path | str):
    """The real command, or any other module, as a `Command`; ended when the block ends."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            cwd=folder,
            env=os.environ | settings,
            stdout=subprocess.DEVNULL,
            stderr=err,
        )
    try:
        yield Command(process, folder)
    finally:
        process.terminate()  # a launcher then ends its ranks
        process.wait(timeout=60)
