"""The hard level of the synthetic scenes: more and smaller objects that overlap, and signs.

As on the easy level, a scene is a function of its image id ("hard-test-000123"), and the hash of
its inventory, here the objects' sizes, colours and shapes and the words on signs, decides its
split. Constants in capitals set the difficulty.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from nemo_vlm_ptq.data import glyphs
from nemo_vlm_ptq.data.scenes import COLORS, SPLIT_SHARES, seeded_random, shuffled

IMAGE_SIZE = 128  # pixels
SUPERSAMPLING = 2
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring", "star")
COUNTS = range(5, 13)  # objects of a scene
MOST_ALIKE = 9  # objects of one colour or of one shape, as numbers are asked for up to nine
HALF_SIZES = {"small": (5.0, 7.0), "large": (9.5, 12.0)}  # pixels
MIN_DISTANCE = 0.55  # of centres, in sums of half sizes
TOUCHING = 0.68  # centres of solid shapes nearer than this surely overlap
TOUCHING_SHARE = 0.35  # of objects that are put next to another
LETTERS = (2, 3, 4)  # of a word
LETTER_CELLS = (3, 4)  # sides of a cell of a letter, in pixels of the canvas
SIGN_MARGIN = 3  # pixels
PREFIX = "hard-"


@dataclass(frozen=True)
class HardObject:
    """One object; those of higher index lie in front.

    index: position in the list of objects.
    size: key of HALF_SIZES.
    color: key of COLORS.
    shape: one of SHAPES.
    x, y: centre in pixels.
    half_size: half of the height in pixels.
    """

    index: int
    size: str
    color: str
    shape: str
    x: float
    y: float
    half_size: float


@dataclass(frozen=True)
class Sign:
    """A coloured plate with a word.

    color: key of COLORS.
    word: capital letters.
    x, y: centre in pixels.
    cell: side of a letter's cell in pixels of the canvas.
    """

    color: str
    word: str
    x: float
    y: float
    cell: int

    @property
    def half_width(self) -> float:
        """Half of the width in pixels."""
        cells = len(self.word) * (glyphs.WIDTH + 1) - 1
        return cells * self.cell / SUPERSAMPLING / 2 + SIGN_MARGIN

    @property
    def half_height(self) -> float:
        """Half of the height in pixels."""
        return glyphs.HEIGHT * self.cell / SUPERSAMPLING / 2 + SIGN_MARGIN


@dataclass(frozen=True)
class HardScene:
    """The objects and signs of an image."""

    objects: tuple[HardObject, ...]
    signs: tuple[Sign, ...]


def draw(image_id: str) -> Image.Image:
    """Draw a scene, 128x128 RGB."""
    scene, rng = generate_scene(image_id)
    brightness = rng.uniform(105, 155)
    background = tuple(int(brightness + rng.uniform(-12, 12)) for _ in range(3))
    side = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), background)
    context = ImageDraw.Draw(canvas)
    for item in scene.objects:
        color = tuple(int(c + rng.uniform(-10, 10)) for c in COLORS[item.color])
        edge = (95, 95, 95) if item.color == "black" else tuple(c // 2 for c in color)
        _draw_shape(context, item, item.half_size, edge)
        _draw_shape(context, item, item.half_size - 1, color)
    for sign in scene.signs:
        _draw_sign(context, sign)
    return canvas.reduce(SUPERSAMPLING)


def generate_scene(image_id: str) -> tuple[HardScene, random.Random]:
    """Generate a scene.

    Returns:
        The scene, and the random generator in the state that drawing continues from.

    Raises:
        ValueError: the id names no split.
    """
    split = image_id.rpartition("-")[0].removeprefix(PREFIX)
    if split not in SPLIT_SHARES or not image_id.startswith(PREFIX):
        known = ", ".join(PREFIX + name for name in SPLIT_SHARES)
        raise ValueError(f"image id must start with a split ({known}), got {image_id!r}")
    rng = seeded_random(image_id)
    while True:
        inventory, signs = _sample_inventory(rng), _sample_words(rng)
        key = str((sorted(inventory), sorted(signs)))
        if seeded_random(key).choice(range(10)) in SPLIT_SHARES[split]:
            break
    while (scene := _place(rng, inventory, signs)) is None:
        pass
    return scene, rng


def _sample_inventory(rng: random.Random) -> list[tuple[str, str, str]]:
    """Sample (size, color, shape) of objects; one of each is often repeated."""
    count = rng.choice(COUNTS)
    columns = []
    for names in (list(HALF_SIZES), list(COLORS), list(SHAPES)):
        main, *others = shuffled(names, rng)
        repeats = rng.choice(range(1, min(MOST_ALIKE, count - 1) + 1))
        column = [main] * repeats + [rng.choice(others) for _ in range(count - repeats)]
        columns.append(shuffled(column, rng))
    return list(zip(*columns, strict=True))


def _sample_words(rng: random.Random) -> list[tuple[str, str]]:
    """Sample (color, word) of one or two signs."""
    colors = shuffled(list(COLORS), rng)[: rng.choice((1, 2))]
    letters = list(glyphs.COLUMNS)
    return [
        (color, "".join(rng.choice(letters) for _ in range(rng.choice(LETTERS))))
        for color in colors
    ]


def _place(
    rng: random.Random, inventory: list[tuple[str, str, str]], words: list[tuple[str, str]]
) -> HardScene | None:
    """Find positions; None if the objects do not fit."""
    signs: list[Sign] = []
    for color, word in words:
        sign = Sign(color, word, 0, 0, rng.choice(LETTER_CELLS))
        x, y = (
            rng.uniform(half + 1, IMAGE_SIZE - half - 1)
            for half in (sign.half_width, sign.half_height)
        )
        signs.append(Sign(color, word, x, y, sign.cell))
    if len(signs) == 2 and abs(signs[0].y - signs[1].y) < 2 + sum(s.half_height for s in signs):
        return None
    objects: list[HardObject] = []
    for index, (size, color, shape) in enumerate(inventory):
        half = rng.uniform(*HALF_SIZES[size])
        for _ in range(30):
            x, y = _sample_position(rng, half, objects)
            if _is_free(x, y, half, objects, signs):
                objects.append(HardObject(index, size, color, shape, x, y, half))
                break
        else:
            return None
    return HardScene(tuple(objects), tuple(signs))


def _sample_position(
    rng: random.Random, half: float, objects: list[HardObject]
) -> tuple[float, float]:
    """Sample a centre, in a share of cases next to an earlier object."""
    if objects and rng.random() < TOUCHING_SHARE:
        other = rng.choice(objects)
        distance = rng.uniform(MIN_DISTANCE, TOUCHING) * (half + other.half_size)
        angle = rng.uniform(0, 2 * math.pi)
        return other.x + distance * math.cos(angle), other.y + distance * math.sin(angle)
    return tuple(rng.uniform(half + 1, IMAGE_SIZE - half - 1) for _ in range(2))  # type: ignore[return-value]


def _is_free(x: float, y: float, half: float, objects: list[HardObject], signs: list[Sign]) -> bool:
    """Return whether an object lies in the image, off signs, and covers no other too far."""
    if not half + 1 <= min(x, y) <= max(x, y) <= IMAGE_SIZE - half - 1:
        return False
    for sign in signs:
        if abs(x - sign.x) < sign.half_width + half and abs(y - sign.y) < sign.half_height + half:
            return False
    return all(
        math.hypot(x - item.x, y - item.y) >= MIN_DISTANCE * (half + item.half_size)
        for item in objects
    )


STAR = [
    (math.sin(k * math.pi / 5) * (1, 0.42)[k % 2], -math.cos(k * math.pi / 5) * (1, 0.42)[k % 2])
    for k in range(10)
]
POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1), (1, 0.88), (-1, 0.88)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "star": STAR,
    "cross": [
        *[(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36)],
        *[(0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)],
    ],
}


def _draw_shape(
    context: ImageDraw.ImageDraw, item: HardObject, half_size: float, color: tuple
) -> None:
    """Draw the shape of an object in one colour; a ring lets through what is behind it."""
    x, y, half = (value * SUPERSAMPLING for value in (item.x, item.y, half_size))
    if item.shape in ("circle", "ring"):
        box = (round(x - half), round(y - half), round(x + half), round(y + half))
        if item.shape == "circle":
            context.ellipse(box, fill=color)
        else:
            inset = item.half_size - half_size  # the edge lies on both sides
            width = round((0.5 * item.half_size - 2 * inset) * SUPERSAMPLING)
            context.ellipse(box, outline=color, width=max(2, width))
        return
    points = [(round(x + half * u), round(y + half * v)) for u, v in POLYGONS[item.shape]]
    context.polygon(points, fill=color)


def _draw_sign(context: ImageDraw.ImageDraw, sign: Sign) -> None:
    """Draw a plate with its word, in black or white."""
    values = sign.x, sign.y, sign.half_width, sign.half_height
    x, y, width, height = (round(value * SUPERSAMPLING) for value in values)
    color = COLORS[sign.color]
    context.rectangle((x - width, y - height, x + width, y + height), fill=color)
    ink = (15, 15, 15) if sum(color) > 330 else (245, 245, 245)
    margin = SIGN_MARGIN * SUPERSAMPLING
    glyphs.draw_word(context, sign.word, x - width + margin, y - height + margin, sign.cell, ink)
