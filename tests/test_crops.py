"""HD transform of Phi-3-vision against an implementation in numpy and PIL."""

import math

import numpy as np
import pytest
from PIL import Image

from nemo_vlm_ptq.families.hd_transform import crop_image

SIDE, MEAN, STD = 24, [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SIZES = {  # (width, height), (rows, columns) of at most 4 crops and of at most 16
    "wide": ((90, 40), (1, 2), (3, 5)),
    "tall": ((37, 101), (2, 1), (5, 2)),
    "square": ((64, 64), (2, 2), (4, 4)),
    "narrow": ((300, 7), (1, 4), (1, 16)),
    "almost square": ((65, 64), (2, 2), (4, 4)),
}


def random_image(width, height):
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def cubic(distance):
    """Return the weight of a pixel at a distance in torch's bicubic interpolation."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def downsample(pixels, side):
    """Interpolate the first axis of an array to `side`, without antialiasing."""
    length = len(pixels)
    out = np.zeros((side, *pixels.shape[1:]))
    for index in range(side):
        center = (index + 0.5) * length / side - 0.5
        for near in range(math.floor(center) - 1, math.floor(center) + 3):
            out[index] += cubic(center - near) * pixels[min(max(near, 0), length - 1)]
    return out


def reference_crops(image, crops):
    """Return views [crops+1,3,S,S] and the padded size of an image."""
    is_portrait = image.height > image.width
    if is_portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    columns = max(n for n in range(1, crops + 1) if n * math.ceil(n / ratio) <= crops)
    height = int(columns * SIDE / ratio)
    image = image.resize((columns * SIDE, height), Image.Resampling.BILINEAR)
    rows = math.ceil(height / SIDE)
    padded = np.full((rows * SIDE, columns * SIDE, 3), 255.0)
    top = (rows * SIDE - height) // 2
    padded[top : top + height] = np.asarray(image)
    if is_portrait:
        padded, rows, columns = padded.swapaxes(0, 1), columns, rows
    padded = (padded / 255 - MEAN) / STD
    views = np.zeros((crops + 1, 3, SIDE, SIDE))
    global_view = downsample(downsample(padded, SIDE).swapaxes(0, 1), SIDE)  # [w,h,3]
    views[0] = global_view.transpose(2, 1, 0)
    for row in range(rows):
        for column in range(columns):
            crop = padded[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
            views[1 + row * columns + column] = crop.transpose(2, 0, 1)
    return views, (rows * SIDE, columns * SIDE)


@pytest.mark.parametrize("crops", [4, 16])
@pytest.mark.parametrize("shape", SIZES)
def test_crops_match_the_reference(shape, crops):
    size, *grids = SIZES[shape]
    views, padded = crop_image(random_image(*size), crops, SIDE, MEAN, STD)
    expected, expected_size = reference_crops(random_image(*size), crops)
    rows, columns = grids[crops == 16]
    assert tuple(padded) == expected_size == (rows * SIDE, columns * SIDE)
    assert views.shape == expected.shape
    np.testing.assert_allclose(views.numpy(), expected, rtol=0, atol=1e-4)


def test_a_grayscale_image_is_converted_to_rgb():
    gray = random_image(50, 40).convert("L")
    views, size = crop_image(gray, 4, SIDE, MEAN, STD)
    expected, expected_size = crop_image(gray.convert("RGB"), 4, SIDE, MEAN, STD)
    assert views.equal(expected)
    assert size == expected_size
