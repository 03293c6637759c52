"""Synthetic scenes of coloured shapes, drawn as images.

They let every stage run without a download. A scene is a function of its image id
("test-000123"), so any process draws the same image. Splits are disjoint: the hash of a scene's
inventory, the colours and shapes of its objects, decides its split.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 64  # pixels
SUPERSAMPLING = 4  # objects are drawn at this multiple of the size and averaged down
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 220, 50),
    "purple": (140, 45, 165),
    "orange": (245, 135, 25),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
SPLIT_SHARES = {"test": range(1), "calibration": range(1, 2), "train": range(2, 10)}  # tenths


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    index: position in the list of objects.
    color: key of COLORS.
    shape: one of SHAPES.
    x, y: centre in pixels.
    half_size: half of the height in pixels.
    """

    index: int
    color: str
    shape: str
    x: float
    y: float
    half_size: float

    @property
    def name(self) -> str:
        """Color and shape, "red circle"."""
        return f"{self.color} {self.shape}"


def draw(image_id: str) -> Image.Image:
    """Draw a scene, 64x64 RGB."""
    objects, rng = generate_scene(image_id)
    brightness = rng.uniform(105, 155)
    background = tuple(int(brightness + rng.uniform(-12, 12)) for _ in range(3))
    side = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), background)
    context = ImageDraw.Draw(canvas)
    for item in objects:
        color = tuple(int(c + rng.uniform(-10, 10)) for c in COLORS[item.color])
        _draw_object(context, item, color, background)
    return canvas.reduce(SUPERSAMPLING)


def generate_scene(image_id: str) -> tuple[list[SceneObject], random.Random]:
    """Generate the objects of an image.

    Returns:
        The objects, and the random generator in the state that drawing continues from.

    Raises:
        ValueError: the id names no split.
    """
    split = image_id.rpartition("-")[0]
    if split not in SPLIT_SHARES:
        raise ValueError(
            f"image id must start with a split ({', '.join(SPLIT_SHARES)}), got {image_id!r}"
        )
    rng = seeded_random(image_id)
    while True:
        inventory = _sample_inventory(rng)
        if seeded_random(str(sorted(inventory))).choice(range(10)) in SPLIT_SHARES[split]:
            break
    while not (positions := _sample_positions(rng, len(inventory))):
        pass
    pairs = zip(inventory, positions, strict=True)
    objects = [
        SceneObject(index=index, color=color, shape=shape, x=x, y=y, half_size=half_size)
        for index, ((color, shape), (x, y, half_size)) in enumerate(pairs)
    ]
    return objects, rng


def seeded_random(name: str) -> random.Random:
    """Return a random generator whose seed is the hash of a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def shuffled(items: Sequence, rng: random.Random) -> list:
    """Return the items in random order."""
    return sorted(items, key=lambda _: rng.random())


def _sample_inventory(rng: random.Random) -> list[tuple[str, str]]:
    """Sample the (color, shape) of 3 to 6 objects; one color and one shape are often repeated."""
    count = rng.choice((3, 4, 5, 6))
    columns = []
    for names in (list(COLORS), list(SHAPES)):
        main, *others = shuffled(names, rng)
        repeats = rng.choice(range(1, min(4, count - 1) + 1))
        column = [main] * repeats + [rng.choice(others) for _ in range(count - repeats)]
        columns.append(shuffled(column, rng))
    return list(zip(*columns, strict=True))


def _sample_positions(rng: random.Random, count: int) -> list[tuple[float, float, float]] | None:
    """Sample (x, y, half_size) of objects at least 2 pixels apart; None if they do not fit."""
    positions: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(20):
            half = rng.uniform(5.5, 8.0)
            x, y = (rng.uniform(half + 1, IMAGE_SIZE - half - 1) for _ in range(2))
            if all(max(abs(x - u), abs(y - v)) > half + h + 2 for u, v, h in positions):
                positions.append((x, y, half))
                break
        else:
            return None
    return positions


def _draw_object(
    context: ImageDraw.ImageDraw, item: SceneObject, color: tuple, background: tuple
) -> None:
    """Draw one object on the supersampled canvas."""

    def scaled(*points: tuple[float, float]) -> list[tuple[int, int]]:
        def to_canvas(center: float, offset: float) -> int:
            return round((center + offset * item.half_size) * SUPERSAMPLING)

        return [(to_canvas(item.x, x), to_canvas(item.y, y)) for x, y in points]

    if item.shape in ("circle", "ring"):
        context.ellipse(scaled((-1, -1), (1, 1)), fill=color)
        if item.shape == "ring":
            context.ellipse(scaled((-0.52, -0.52), (0.52, 0.52)), fill=background)
    elif item.shape == "square":
        context.rectangle(scaled((-0.88, -0.88), (0.88, 0.88)), fill=color)
    elif item.shape == "cross":
        context.rectangle(scaled((-1, -0.32), (1, 0.32)), fill=color)
        context.rectangle(scaled((-0.32, -1), (0.32, 1)), fill=color)
    elif item.shape == "triangle":
        context.polygon(scaled((0, -1), (1, 0.88), (-1, 0.88)), fill=color)
    else:
        context.polygon(scaled((0, -1), (1, 0), (0, 1), (-1, 0)), fill=color)
