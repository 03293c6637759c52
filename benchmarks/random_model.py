"""Makes a checkpoint of a published model's sizes with random weights, for runs at real size.

    python benchmarks/random_model.py MODEL FOLDER [LAYERS] [--weights-only]

MODEL is a name of tests/families/*.json (llava-1.5-7b-hf, VILA1.5-3b, Phi-3-vision-128k-instruct),
or llava-34b: LLaVA-1.5 with a decoder of Yi-34B's sizes, which was not published as such.
Published layout and names, bf16, in files of at most 5 GB; LAYERS: decoder layers, all unless told.
Weights are made on the GPU when there is one. Tokenizer and image processor are those of the small
model of the family in assets/, at the real sizes; --weights-only leaves them out.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.families import ModelFamily, find_family
from nemo_vlm_ptq.workdir.store import read_json, save_tensors, write_json

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = sorted((ROOT / "tests" / "families").glob("*.json"))
TINY = {"llava": "tiny-llava", "llava_next": "tiny-llava", "phi": "tiny-phi", "vila": "tiny-vila"}
YI_34B = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64000,
}
FILE_BYTES = 5e9  # transformers' rule, by which the published folders were cut
PHI_CROPS = 16  # as published
STD = 0.02

Shapes = Mapping[str, tuple[int, ...]]  # published name -> shape


def published_config(model: str) -> dict[str, Any]:
    """config.json of a published model; names the known ones when it is not one."""
    known: dict[str, Any] = {}
    for path in FIXTURES:
        known |= read_json(path)["models"]
    known["llava-34b"] = copy.deepcopy(known["llava-1.5-7b-hf"])
    known["llava-34b"]["config"]["text_config"] |= YI_34B
    if model not in known:
        raise SystemExit(f"{model} is not known; known: {', '.join(known)}")
    return known[model]["config"]


def write_model(
    model: str, folder: Path, layers: int | None = None, weights_only: bool = False
) -> None:
    """Write the folder; says which file of assets/ is missing before it writes anything."""
    config = published_config(model)
    if layers is not None:
        decoder = config.get("llm_cfg") or config.get("text_config") or config
        decoder["num_hidden_layers"] = layers
    family = find_family(config)
    tiny = ROOT / "assets" / TINY[family.name]
    if not weights_only:
        tokenizer = tiny / family.decoder_subfolder / "tokenizer.json"
        if not tokenizer.is_file():
            raise SystemExit(
                f"{tokenizer} is missing: without it no question can be prepared; "
                "--weights-only writes a folder that can be imported all the same"
            )
        if "image_token_index" in config:
            config["image_token_index"] = read_json(tiny / "config.json")["image_token_index"]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    for part in family.subfolders:
        (folder / part).mkdir(exist_ok=True)
        if part:
            write_json(folder / part / "config.json", config[f"{part}_cfg"])
        if not weights_only:
            _copy_processors(tiny / part, folder / part, family, config)
    shapes = family.decoder(config).shapes(family.parameter_map) | family.vision_shapes(config)
    _write_weights(folder, family, shapes)


def _copy_processors(
    source: Path, folder: Path, family: ModelFamily, config: Mapping[str, Any]
) -> None:
    for path in source.glob("*.json"):
        if path.name == "preprocessor_config.json":
            write_json(folder / path.name, read_json(path) | _image_settings(family, config))
        elif path.name == "processor_config.json":
            patch = {"patch_size": config["vision_config"]["patch_size"]}
            write_json(folder / path.name, read_json(path) | patch)
        elif path.name not in ("config.json", "modelopt.json"):
            shutil.copy(path, folder / path.name)


def _image_settings(family: ModelFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the image processor is told at the real sizes."""
    if family.name == "phi":
        tokens = config["img_processor"]["num_img_tokens"]
        return {"num_crops": PHI_CROPS, "num_img_tokens": tokens}
    if family.name == "vila":
        side = config["vision_tower_cfg"]["image_size"]
        return {"size": {"height": side, "width": side}}
    side = config["vision_config"]["image_size"]
    square = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    grids = config.get("image_grid_pinpoints")
    return square | ({"image_grid_pinpoints": grids} if grids else {})


def _write_weights(folder: Path, family: ModelFamily, shapes: Shapes) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for part in family.subfolders:
        start = f"{part}/" if part else ""
        own = {name.removeprefix(start): shapes[name] for name in shapes if name.startswith(start)}
        files = list(_cut(own))
        index: dict[str, str] = {}
        for number, names in enumerate(files, 1):
            file = "model.safetensors"
            if len(files) > 1:
                file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {name: _noise(name, own[name], generator) for name in names}
            save_tensors(tensors, folder / part / file)
            index |= dict.fromkeys(names, file)
        if len(files) > 1:
            total = sum(2 * math.prod(shape) for shape in own.values())
            whole = {"metadata": {"total_size": total}, "weight_map": index}
            write_json(folder / part / "model.safetensors.index.json", whole)


def _cut(shapes: Shapes) -> Iterator[list[str]]:
    """Names of one file after the other."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = 2 * math.prod(shape)
        if names and size + own > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _noise(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random weights; those of a norm, the only weights of one axis, lie around 1."""
    center = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    made = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return made.normal_(center, STD, generator=generator)


def main() -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description="a model folder with random weights")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("layers", type=int, nargs="?")
    parser.add_argument("--weights-only", action="store_true")
    write_model(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
