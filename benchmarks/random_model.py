"""Write a checkpoint with a published model's sizes and random weights, for runs at full size.

    python benchmarks/random_model.py MODEL FOLDER [LAYERS] [--weights-only]

MODEL is a name of tests/families/*.json (llava-1.5-7b-hf, Qwen3.6-27B, gemma-3-27b-it), or
llava-34b and llava-72b: LLaVA-1.5 with decoders of Yi-34B's and of a 72B Llama's sizes, which were
not published as such. Layout and tensor names are the published ones; weights are in bf16, in files
of at most 5 GB. LAYERS is the number of decoder layers (default: all). Weights are drawn on the GPU
if there is one. Tokenizer and image processor are copied from the small model of the family in
assets/, with image settings of the full size; --weights-only omits them. A family of
chat_processors.py gets tiny-llava's tokenizer with its own image tokens added.
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
from chat_processors import CHAT_PROCESSORS, write_chat_processor

from nemo_vlm_ptq.families import ModelFamily, find_family
from nemo_vlm_ptq.workdir.store import read_json, save_tensors, write_json

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = sorted((ROOT / "tests" / "families").glob("*.json"))
TINY_MODELS = {"phi": "tiny-phi", "vila": "tiny-vila"}  # the others: tiny-llava
YI_34B = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64000,
}
LLAMA_72B = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
MAX_FILE_BYTES = 5e9  # the file size at which transformers sharded the published checkpoints
PHI_CROPS = 16  # num_crops of the published Phi-3-vision
WEIGHT_STD = 0.02

Shapes = Mapping[str, tuple[int, ...]]  # published name -> shape


def published_config(model: str) -> dict[str, Any]:
    """Return the config.json of a published model.

    Raises:
        SystemExit: the model is unknown; lists the known ones.
    """
    known: dict[str, Any] = {}
    for path in FIXTURES:
        known |= read_json(path)["models"]
    known["llava-34b"] = copy.deepcopy(known["llava-1.5-7b-hf"])
    known["llava-34b"]["config"]["text_config"] |= YI_34B
    known["llava-72b"] = copy.deepcopy(known["llava-1.5-7b-hf"])
    known["llava-72b"]["config"]["text_config"] |= LLAMA_72B
    if model not in known:
        raise SystemExit(f"unknown model {model!r}; supported: {', '.join(known)}")
    return known[model]["config"]


def write_model(
    model: str, folder: Path, layers: int | None = None, weights_only: bool = False
) -> None:
    """Write the model folder.

    Args:
        model: name of a published model.
        folder: where to write; must not exist.
        layers: number of decoder layers; None for all.
        weights_only: omit tokenizer and image processor.

    Raises:
        SystemExit: the tokenizer in assets/ is missing; nothing has been written.
    """
    config = published_config(model)
    if layers is not None:
        decoder = config.get("llm_cfg") or config.get("text_config") or config
        decoder["num_hidden_layers"] = layers
        if "layer_types" in decoder:
            decoder["layer_types"] = decoder["layer_types"][:layers]
    family = find_family(config)
    tiny = ROOT / "assets" / TINY_MODELS.get(family.name, "tiny-llava")
    if not weights_only:
        tokenizer = tiny / family.decoder_subfolder / "tokenizer.json"
        if not tokenizer.is_file():
            raise SystemExit(
                f"{tokenizer} is missing; restore it, or use --weights-only to write a folder that "
                "can be imported but not calibrated"
            )
        if "image_token_index" in config:
            config["image_token_index"] = read_json(tiny / "config.json")["image_token_index"]
    folder.mkdir(parents=True)
    chats = family.name in CHAT_PROCESSORS
    if chats and not weights_only:
        config |= write_chat_processor(family.name, tiny, folder, config)
    write_json(folder / "config.json", config)
    for part in family.subfolders:
        (folder / part).mkdir(exist_ok=True)
        if part:
            write_json(folder / part / "config.json", config[f"{part}_cfg"])
        if not weights_only and not chats:
            _copy_processors(tiny / part, folder / part, family, config)
    decoder = family.decoder(config)
    shapes = decoder.shapes(family.parameter_map(decoder)) | family.vision_shapes(config)
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
    """Return the settings of the image processor that depend on the size of the model."""
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
        prefix = f"{part}/" if part else ""
        part_shapes = {
            name.removeprefix(prefix): shapes[name] for name in shapes if name.startswith(prefix)
        }
        files = list(_split_into_files(part_shapes))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(files, 1):
            file = "model.safetensors"
            if len(files) > 1:
                file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {name: random_tensor(name, part_shapes[name], generator) for name in names}
            save_tensors(tensors, folder / part / file)
            weight_map |= dict.fromkeys(names, file)
        if len(files) > 1:
            total = sum(2 * math.prod(shape) for shape in part_shapes.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / part / "model.safetensors.index.json", index)


def _split_into_files(shapes: Shapes) -> Iterator[list[str]]:
    """Yield the tensor names of each file."""
    names: list[str] = []
    file_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = 2 * math.prod(shape)
        if names and file_bytes + tensor_bytes > MAX_FILE_BYTES:
            yield names
            names, file_bytes = [], 0
        names.append(name)
        file_bytes += tensor_bytes
    yield names


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw a bf16 tensor; the mean is 1 for norm weights (the only 1-D weights), 0 otherwise."""
    mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    tensor = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return tensor.normal_(mean, WEIGHT_STD, generator=generator)


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description="write a model folder with random weights")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("layers", type=int, nargs="?")
    parser.add_argument("--weights-only", action="store_true")
    write_model(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
