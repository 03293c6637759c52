"""Read and check the inputs of `logits`, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.safetensors_header import read_safetensors_header
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.families.tiles import drop_padding
from nemo_vlm_ptq.input_files import one_line
from nemo_vlm_ptq.planning.plan import Plan

LEAST_ID = -4096  # placeholders of images have small negative ids in some families

Tensors = Mapping[str, torch.Tensor]


def read_inputs(plan: Plan, path: Path) -> tuple[list[Sample], list[torch.Tensor | None]]:
    """Return each row as a sample with its images, and the attention masks.

    Raises:
        UserError: the file is not of the format safetensors, or its tensors do not suit each other
            or the model.
    """
    read_safetensors_header(path)
    tensors: Tensors = load_file(path)
    _check_ids(tensors)
    if "pixel_values" in tensors:
        if plan.family.pads_tiles:
            tensors = _without_padding(tensors)
        _check_images(plan, tensors)
    samples, masks = _make_samples(plan, tensors)
    with torch.device("meta"):
        vision_module = plan.family.make_vision_module(plan.config)
    for sample in samples:
        _check_sample(plan, vision_module, sample)
    return samples, masks


def _check_ids(tensors: Tensors) -> None:
    """Check input_ids and attention_mask without regard to the model."""
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if ids is None:
        raise UserError("inputs must have input_ids [B,S]")
    if not _is_integer(ids) or ids.dim() != 2 or not ids.numel():
        raise UserError(f"input_ids must be integers [B,S], got {_describe(ids)}")
    if int(ids.min()) < LEAST_ID:
        raise UserError(f"input_ids must be ids of tokens, got {int(ids.min())}")
    if mask is None:
        return
    if mask.is_floating_point() or mask.is_complex() or mask.shape != ids.shape:
        raise UserError(
            f"attention_mask must be integers {list(ids.shape)} as input_ids, got {_describe(mask)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError("attention_mask must hold 0 and 1 only")


def _without_padding(tensors: Tensors) -> Tensors:
    """Return pixel_values [tiles,3,h,w] and pixel_attention_mask [tiles,h,w] of all rows."""
    pixels, mask = tensors["pixel_values"], tensors.get("pixel_attention_mask")
    rows = len(tensors["input_ids"])
    if pixels.dim() != 5 or len(pixels) != rows:
        raise UserError(
            f"pixel_values must be numbers [{rows},tiles,3,h,w], a row for each of input_ids, got "
            f"{_describe(pixels)}"
        )
    if mask is not None:
        shape = [*pixels.shape[:2], *pixels.shape[3:]]
        if mask.is_floating_point() or mask.is_complex() or list(mask.shape) != shape:
            raise UserError(f"pixel_attention_mask must be integers {shape}, got {_describe(mask)}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError("pixel_attention_mask must hold 0 and 1 only")
    pixels, mask = drop_padding(pixels, mask)
    if mask is None:
        return {**tensors, "pixel_values": pixels}
    if not bool(mask[:, 0, 0].all()):
        raise UserError(
            "pixel_attention_mask must be 1 at the first pixel of each tile with an image"
        )
    return {**tensors, "pixel_values": pixels, "pixel_attention_mask": mask}


def _check_images(plan: Plan, tensors: Tensors) -> None:
    """Check pixel_values and what goes with them without regard to the rows."""
    pixels, sizes = tensors["pixel_values"], tensors.get("image_sizes")
    if plan.family.positions is not None:
        _check_grids(pixels, tensors.get("image_grid_thw"))
        return
    family = plan.family
    if family.pads_patches:
        _check_patches(pixels, tensors.get("image_position_ids"))
        return
    keeps_shape = family.is_tiled or family.pixels_per_token is not None
    has_views = family.tokens_per_image is None and not keeps_shape
    expected = "[images,views,3,h,w]" if has_views else "[images,3,h,w]"
    is_float = pixels.is_floating_point() and pixels.element_size() > 1
    if not is_float or pixels.dim() != 4 + has_views or pixels.shape[-3] != 3:
        raise UserError(f"pixel_values must be numbers {expected}, got {_describe(pixels)}")
    if not bool(pixels.isfinite().all()):
        raise UserError("pixel_values hold NaN or Inf")
    if sizes is None:
        return
    if not _is_integer(sizes) or sizes.shape != (len(pixels), 2):
        raise UserError(f"image_sizes must be integers [{len(pixels)}, 2], got {_describe(sizes)}")
    if not bool(((sizes > 0) & (sizes < 1 << 20)).all()):
        raise UserError("image_sizes must be heights and widths in pixels")


def _check_patches(pixels: torch.Tensor, places: torch.Tensor | None) -> None:
    """Check the padded patches of images; the family checks the values of their places."""
    is_float = pixels.is_floating_point() and pixels.element_size() > 1
    if not is_float or pixels.dim() != 3 or not pixels.numel():
        raise UserError(f"pixel_values must be numbers [images,patches,C], got {_describe(pixels)}")
    if not bool(pixels.isfinite().all()):
        raise UserError("pixel_values hold NaN or Inf")
    shape = [*pixels.shape[:2], 2]
    if places is None or not _is_integer(places) or list(places.shape) != shape:
        got = "none" if places is None else _describe(places)
        raise UserError(f"image_position_ids must be integers {shape}, got {got}")


def _check_grids(pixels: torch.Tensor, grids: torch.Tensor | None) -> None:
    """Check the patches of images of any size, and their numbers in time, height and width."""
    is_float = pixels.is_floating_point() and pixels.element_size() > 1
    if not is_float or pixels.dim() != 2:
        raise UserError(f"pixel_values must be numbers [patches,C], got {_describe(pixels)}")
    if not bool(pixels.isfinite().all()):
        raise UserError("pixel_values hold NaN or Inf")
    if grids is None or not _is_integer(grids) or grids.dim() != 2 or grids.shape[1] != 3:
        got = "none" if grids is None else _describe(grids)
        raise UserError(f"image_grid_thw must be integers [images,3], got {got}")
    if not bool(((grids > 0) & (grids < 1 << 20)).all()):
        raise UserError("image_grid_thw must be numbers of patches")
    if int(grids.prod(dim=1).sum()) != len(pixels):
        raise UserError(
            f"pixel_values hold {len(pixels)} patches, and image_grid_thw stands for "
            f"{int(grids.prod(dim=1).sum())}"
        )


def _check_sample(plan: Plan, vision_module: torch.nn.Module, sample: Sample) -> None:
    """Check the ids of a row against the embedding, and its images against the vision tower."""
    wrong = sample.input_ids[~sample.is_image & (sample.input_ids < 0)].tolist()
    wrong += sample.input_ids[sample.input_ids >= plan.decoder.vocab].tolist()
    if wrong:
        raise UserError(
            f"{sample.id} of input_ids has the id {wrong[0]}; the embedding has the ids 0 to "
            f"{plan.decoder.vocab - 1}"
        )
    if len(sample.input_ids) > plan.decoder.max_positions:
        raise UserError(
            f"{sample.id} of input_ids has {len(sample.input_ids)} tokens, and the model has "
            f"{plan.decoder.max_positions} positions"
        )
    if sample.images is None:
        return
    images = sample.images.to_meta()
    try:
        features = len(vision_module(images))
    except (ValueError, RuntimeError, IndexError) as error:  # of transformers and torch
        raise UserError(
            f"{sample.id}: pixel_values {list(images.pixel_values.shape)} do not suit the vision "
            f"tower: {one_line(error)}"
        ) from None
    if features != int(sample.is_image.sum()):
        raise UserError(
            f"{sample.id} of input_ids has {int(sample.is_image.sum())} image tokens, and its "
            f"images have {features} features"
        )


def _positions(
    plan: Plan,
    row: int,
    is_image: torch.Tensor,
    images: ImageInputs | None,
    mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the positions [3,S] of a row, 0 where it is masked; None for plain positions."""
    if plan.family.positions is None:
        return None
    kept = torch.ones_like(is_image) if mask is None else mask.bool()
    if bool((is_image & ~kept).any()):
        raise UserError(f"row {row} of attention_mask hides image tokens, which is not supported")
    positions = torch.zeros(3, len(is_image), dtype=torch.int64)
    positions[:, kept] = plan.family.positions(plan.config, is_image[kept], images)
    return positions


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _make_samples(plan: Plan, tensors: Tensors) -> tuple[list[Sample], list[torch.Tensor | None]]:
    """Return each row as a sample with its images, and the attention masks."""
    remaining = None
    if "pixel_values" in tensors:
        sizes, grids = (tensors.get(key) for key in ("image_sizes", "image_grid_thw"))
        mask = tensors.get("pixel_attention_mask") if plan.family.pads_tiles else None
        places = tensors["image_position_ids"].long() if plan.family.pads_patches else None
        remaining = ImageInputs(tensors["pixel_values"], sizes, grids, mask, places)
    masks = tensors.get("attention_mask")
    samples: list[Sample] = []
    expanded_masks: list[torch.Tensor | None] = []
    for row, ids in enumerate(tensors["input_ids"].long()):
        try:
            placeholders = plan.family.find_placeholders(plan.config, ids, remaining)
        except UserError as error:
            raise UserError(f"row {row} of input_ids: {error}") from None
        count = placeholders.num_images
        available = 0 if remaining is None else len(remaining)
        if count > available:
            raise UserError(
                f"row {row} of input_ids has {count} images, and {available} images remain"
            )
        repeats = torch.where(placeholders.is_image, placeholders.tokens_per_placeholder, 1)
        images = remaining.slice(0, count) if remaining is not None and count else None
        remaining = None if remaining is None else remaining.slice(count)
        mask = None if masks is None else masks[row].repeat_interleave(repeats)
        is_image = placeholders.is_image.repeat_interleave(repeats)
        samples.append(
            Sample(
                id=f"row {row}",
                input_ids=ids.repeat_interleave(repeats),
                is_image=is_image,
                images=images,
                positions=_positions(plan, row, is_image, images, mask),
            )
        )
        expanded_masks.append(mask)
    if remaining is not None and len(remaining):
        used = sum(len(sample.images) for sample in samples if sample.images is not None)
        raise UserError(
            f"pixel_values hold {used + len(remaining)} images, of which input_ids leave "
            f"{len(remaining)} unused"
        )
    return samples, expanded_masks
