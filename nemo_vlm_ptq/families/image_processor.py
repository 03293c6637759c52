"""Image processors of model folders: transformers' own classes, with settings that can work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.folder_files import require_file
from nemo_vlm_ptq.input_files import one_line, shorten

MAX_SIDE = 2048  # pixels of a resized image
MAX_PIXELS = 1 << 26  # of an image of any shape
MAX_PATCH = 256
MAX_CROPS = 144
SIZE_KEYS = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
MODULES = {
    "CLIPImageProcessor": "clip",
    "Gemma3ImageProcessor": "gemma3",
    "Gemma4ImageProcessor": "gemma4",
    "GotOcr2ImageProcessor": "got_ocr2",
    "Idefics3ImageProcessor": "idefics3",
    "LlavaImageProcessor": "llava",
    "LlavaNextImageProcessor": "llava_next",
    "LlavaOnevisionImageProcessor": "llava_onevision",
    "PixtralImageProcessor": "pixtral",
    "Qwen2VLImageProcessor": "qwen2_vl",
    "SiglipImageProcessor": "siglip",
    "SmolVLMImageProcessor": "smolvlm",
}


def load_image_processor(folder: Path, supported: tuple[str, ...], side: int) -> Any:
    """Return the image processor that a folder names, in transformers' PIL variant.

    Args:
        folder: folder of preprocessor_config.json or processor_config.json.
        supported: names of classes; the first is that of a folder without a name.
        side: height and width of the vision tower's images in pixels.

    Raises:
        UserError: the folder has no settings, settings that cannot work, or another class; or
            images do not leave the processor in the size that the vision tower takes.
    """
    path, processor = _make_processor(folder, supported, MAX_SIDE)
    _check_sizes(folder, path, processor, side)
    return processor


def load_patch_processor(folder: Path, supported: tuple[str, ...], vision: Any) -> Any:
    """Return the image processor of a folder whose images keep their shape, cut into patches.

    Args:
        folder: folder of preprocessor_config.json or processor_config.json.
        supported: names of classes; the first is that of a folder without a name.
        vision: transformers' config of the tower.

    Raises:
        UserError: as `load_image_processor`; or the patches are not those of the tower.
    """
    path, processor = _make_processor(folder, supported, MAX_PIXELS)
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    _require_sizes(path, processor, sizes)
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not (vision.patch_size * vision.spatial_merge_size) ** 2 <= most or least > most:
        raise UserError(f"{path}: images cannot have from {least} to {most} pixels")
    return processor


def load_pooled_processor(folder: Path, supported: tuple[str, ...], vision: Any) -> Any:
    """Return the image processor of a folder whose images keep their shape, as padded patches.

    Args:
        folder: folder of preprocessor_config.json or processor_config.json.
        supported: names of classes; the first is that of a folder without a name.
        vision: transformers' config of the tower.

    Raises:
        UserError: as `load_image_processor`; or the patches are not those of the tower.
    """
    path, processor = _make_processor(folder, supported, MAX_SIDE)
    pooling = vision.pooling_kernel_size
    sizes = {"patch_size": vision.patch_size, "pooling_kernel_size": pooling, "do_resize": True}
    _require_sizes(path, processor, sizes)
    most, places = processor.max_soft_tokens, vision.position_embedding_size
    if most * pooling > places:
        raise UserError(
            f"{path}: max_soft_tokens is {most}; the vision tower has positions for an image of "
            f"{places // pooling} tokens in a row"
        )
    return processor


def _require_sizes(path: Path, processor: Any, sizes: Mapping[str, Any]) -> None:
    """Require settings that suit the vision tower."""
    for key, size in sizes.items():
        if getattr(processor, key) != size:
            raise UserError(
                f"{path}: {key} is {getattr(processor, key)!r}; the vision tower has {size}"
            )


def load_any_size_processor(folder: Path, supported: tuple[str, ...]) -> Any:
    """Return the image processor of a folder whose images keep their shape.

    Args:
        folder: folder of preprocessor_config.json or processor_config.json.
        supported: names of classes; the first is that of a folder without a name.

    Raises:
        UserError: as `load_image_processor`; or no size of the longest edge.
    """
    path, processor = _make_processor(folder, supported, MAX_SIDE)
    if not (processor.size or {}).get("longest_edge"):
        raise UserError(f"{path}: size must have longest_edge, got {processor.size!r}")
    return processor


def _make_processor(folder: Path, supported: tuple[str, ...], most: int) -> tuple[Path, Any]:
    """Return the file of the settings, and the processor; `most`: largest value of a size."""
    path, settings = read_settings(folder, most)
    name = settings.get("feature_extractor_type") or supported[0]
    name = name.replace("FeatureExtractor", "ImageProcessor")
    name = settings.get("image_processor_type") or name
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name not in supported:
        raise UserError(
            f"{path}: image processor {shorten(name, 400)!r} is not supported for this model; "
            f"supported: {', '.join(supported)}"
        )
    module = f"transformers.models.{MODULES[name]}.image_processing_pil_{MODULES[name]}"
    processor_class = getattr(import_module(module), f"{name}Pil")
    try:
        return path, processor_class.from_pretrained(folder)
    except Exception as error:  # transformers raises all kinds on invalid settings
        raise UserError(f"{path} is invalid: {one_line(error)}") from None


def read_settings(folder: Path, most: int = MAX_SIDE) -> tuple[Path, dict[str, Any]]:
    """Return the file that transformers reads the image processor's settings from, and these.

    Args:
        folder: the folder.
        most: largest value of a size, in pixels.

    Raises:
        UserError: the folder has no settings, or settings that cannot work.
    """
    path = folder / "processor_config.json"
    settings: Any = read_json_object(path).get("image_processor") if path.exists() else None
    if settings is None:
        path = require_file(folder, "preprocessor_config.json")
        settings = read_json_object(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: image_processor must be an object, got {settings!r}")
    for key, (accepts, expected) in _checks(most).items():
        if settings.get(key) is not None and not accepts(settings[key]):
            raise UserError(f"{path}: {key} must be {expected}, got {shorten(repr(settings[key]))}")
    return path, settings


def _check_sizes(folder: Path, path: Path, processor: Any, side: int) -> None:
    """Require that images of different shapes become images of the vision tower's size."""
    for width, height in ((2 * side, side), (side, 2 * side)):
        image = PIL.Image.new("RGB", (width, height))
        try:
            pixels = processor(image, return_tensors="pt")["pixel_values"]
        except Exception as error:  # as above
            raise UserError(f"{path}: the image processor fails: {one_line(error)}") from None
        found = tuple(pixels.shape[-2:])
        if found == (side, side):
            continue
        hint = ""
        if side in found:
            hint = "; set do_center_crop, or a size with height and width"
        raise UserError(
            f"{folder}: the image processor does not match the vision tower: an image of "
            f"{height}*{width} pixels becomes {found[0]}*{found[1]}, expected {side}*{side}{hint}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_patch(value: Any) -> bool:
    sides = list(value.values()) if isinstance(value, Mapping) else [value]
    return bool(sides) and all(_is_count(side, MAX_PATCH) for side in sides)


def _is_size(value: Any, most: int) -> bool:
    if not isinstance(value, Mapping):
        return _is_count(value, most)
    sides = [value[key] for key in value if value[key] is not None]
    known = bool(sides) and set(value) <= set(SIZE_KEYS)
    return known and all(_is_count(side, most) for side in sides)


def _is_mean(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_std(value: Any) -> bool:
    return _is_mean(value) and min(value) > 0


def _is_grid(value: Any) -> bool:
    pairs = value if isinstance(value, list) and 0 < len(value) <= MAX_CROPS else [None]
    return all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_grid_side, pair))
        for pair in pairs
    )


def _is_grid_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 4 * MAX_SIDE


_FLAG = (lambda value: isinstance(value, bool), "true or false")
_STEPS = (
    *("resize", "center_crop", "rescale", "normalize", "convert_rgb", "pad"),
    *("pan_and_scan", "image_splitting"),
)
_CROPS = (partial(_is_count, most=MAX_CROPS), f"an integer from 1 to {MAX_CROPS}")
_NAME = (lambda value: isinstance(value, str), "the name of a class")
_CHECKS: dict[str, tuple[Any, str]] = {
    "image_processor_type": _NAME,
    "feature_extractor_type": _NAME,
    "image_mean": (_is_mean, "three numbers"),
    "image_std": (_is_std, "three positive numbers"),
    "rescale_factor": (lambda value: _is_number(value) and value > 0, "a positive number"),
    "resample": (lambda value: type(value) is int and 0 <= value <= 5, "an integer from 0 to 5"),
    "image_grid_pinpoints": (_is_grid, f"pairs of pixels up to {4 * MAX_SIDE}"),
} | {
    **dict.fromkeys(("num_crops", "min_patches", "max_patches"), _CROPS),
    **dict.fromkeys(("crop_to_patches", *(f"do_{step}" for step in _STEPS)), _FLAG),
}


def _checks(most: int) -> dict[str, tuple[Any, str]]:
    """Return what the values of settings must be; `most`: largest value of a size."""
    size = (partial(_is_size, most=most), f"pixels from 1 to {most}")
    count = (partial(_is_count, most=most), f"pixels from 1 to {most}")
    patch = (_is_patch, f"an integer from 1 to {MAX_PATCH}")
    return (
        _CHECKS
        | dict.fromkeys(("size", "crop_size", "pad_size", "max_image_size"), size)
        | dict.fromkeys(("min_pixels", "max_pixels"), count)
        | dict.fromkeys(("patch_size", "merge_size", "temporal_patch_size"), patch)
        | {"pooling_kernel_size": patch}
    )
