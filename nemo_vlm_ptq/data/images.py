"""Image files of a data folder, as transformers loads them: turned as EXIF says, in RGB."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import PIL.Image
import PIL.ImageOps

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import is_file, one_line, open_file, resolve, shorten

IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "JPG", "PNG", "JPEG", "WEBP")
# What files with these endings hold in practice; other decoders of Pillow start programs.
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 1 << 26
MAX_EDGE = 1 << 14  # a processor may pad an image to a square
MAX_ASPECT = 50  # a processor that resizes the shorter side multiplies the longer one
UNREADABLE = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)


def image_file(folder: Path, name: str) -> Path:
    """Return the file of an image; the folder `images` may be a link.

    Raises:
        UserError: it does not exist, or lies elsewhere.
    """
    images = folder / "images"
    for suffix in IMAGE_SUFFIXES:
        path = images / f"{name}.{suffix}"
        if is_file(path):
            if not resolve(path).is_relative_to(resolve(images)):
                raise UserError(f"imageId {shorten(name)!r} leads out of {images}: {resolve(path)}")
            return path
    raise UserError(f"{images} has no {shorten(name)}.jpg, .png, .jpeg or .webp")


def check_image(path: Path) -> None:
    """Check the header of an image file; no pixel is decoded.

    Raises:
        UserError: it is no image, too large, or in a mode that turns white in RGB.
    """
    with open_file(path) as file:
        try:
            _open(path, file).close()
        except UNREADABLE as error:
            raise _unreadable(path, error) from None


def open_image(folder: Path, name: str) -> PIL.Image.Image:
    """Return an image in RGB.

    Raises:
        UserError: as image_file and check_image, or the file is damaged.
    """
    path = image_file(folder, name)
    with open_file(path) as file:
        try:
            image = PIL.ImageOps.exif_transpose(_open(path, file))
            return image.convert("RGB")
        except UNREADABLE as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = one_line(error)
    if isinstance(error, PIL.UnidentifiedImageError):
        reason = f"cannot identify its format; supported: {', '.join(DECODERS)}"
    return UserError(f"{path} is not a readable image: {reason}")


def _open(path: Path, file: IO[bytes]) -> PIL.Image.Image:
    """Open an image without decoding it, and check size and mode."""
    image = PIL.Image.open(file, formats=DECODERS)
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_EDGE:
        raise UserError(
            f"{path} has {width} x {height} pixels; supported: {MAX_EDGE:,} a side and "
            f"{MAX_PIXELS:,} in all; resize it"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{path} has {width} x {height} pixels; one side may be {MAX_ASPECT} times as long as "
            "the other; crop it"
        )
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"{path} has 16 or 32 bits a pixel (mode {image.mode}), of which RGB keeps the lowest "
            "8: it would be white; save it with 8 bits"
        )
    return image
