"""Image processing of Phi-3-vision (HD transform), which transformers does not have.

An image is resized and padded to a grid of square crops. The model sees a downsampled view of the
whole image, the global view, and the crops.

Legend: n images, S side of a crop in pixels, m image tokens along a side of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

PADDING_COLOR = (255, 255, 255)


def token_count(height: int, width: int, side: int, m: int) -> int:
    """Return the number of tokens of an image with a padded size of height x width pixels.

    Tokens are those of the global view and of the crops, a separator after each row of tokens of
    either, and a separator between them.
    """
    rows, columns = height // side, width // side
    return (rows * columns + 1) * m * m + 1 + (rows + 1) * m


def crop_image(
    image: PIL.Image.Image, crops: int, side: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Split an image into the global view and at most `crops` crops.

    Args:
        image: the image, in any mode.
        crops: the largest number of crops.
        side: S.
        mean: mean of each channel, for normalization.
        std: standard deviation of each channel, for normalization.

    Returns:
        Views [crops+1,3,S,S], global view first, padded with views of zeros; and the (height,
        width) of the padded image.
    """
    padded = resize_and_pad(image.convert("RGB"), crops, side)
    array = np.asarray(padded, dtype=np.float32).transpose(2, 0, 1) / 255
    pixels = torch.from_numpy(array)
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    image_views = global_view_and_crops(pixels[None], side)[0]
    views = torch.zeros(crops + 1, 3, side, side)
    views[: len(image_views)] = image_views
    return views, (padded.height, padded.width)


def global_view_and_crops(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Split images [n,3,h,w], h and w multiples of S, into views [n,1+crops,3,S,S].

    The global view comes first, then the crops row by row.
    """
    global_view = functional.interpolate(pixels, size=(side, side), mode="bicubic")
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    crops = pixels.unflatten(3, (columns, side)).unflatten(2, (rows, side))
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([global_view[:, None], crops], dim=1)


def resize_and_pad(image: PIL.Image.Image, crops: int, side: int) -> PIL.Image.Image:
    """Resize an RGB image to a width of whole crops and pad its height to whole crops.

    The grid has as many columns as `crops` allow. A portrait image is transposed before and after.
    """
    is_portrait = image.width < image.height
    if is_portrait:
        image = image.transpose(PIL.Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    columns = 0
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= crops:
        columns += 1
    width = columns * side
    height = max(1, int(width / ratio))
    image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    padded_height = -(-height // side) * side
    padded = PIL.Image.new("RGB", (width, padded_height), PADDING_COLOR)
    padded.paste(image, (0, (padded_height - height) // 2))
    return padded.transpose(PIL.Image.Transpose.TRANSPOSE) if is_portrait else padded
