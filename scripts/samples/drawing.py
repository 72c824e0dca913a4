"""Small drawn images with known objects, from which `scripts.make_samples` writes samples in every published form.

Only the drawing is here, and what it knows of its objects: names, colours, boxes and outlines. It uses none of the project's own
readers or mask code, so that tests of those are not tests of themselves.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]  # xyxy px

COLOURS = {
    "red": (205, 45, 40),
    "blue": (40, 80, 200),
    "yellow": (235, 205, 50),
    "purple": (130, 60, 160),
    "orange": (240, 140, 30),
    "white": (245, 245, 240),
    "black": (30, 30, 35),
    "pink": (240, 150, 180),
}
OUTLINES = {  # how many corners a kind of object has: 4 is a rectangle
    "person": 9,
    "dog": 7,
    "cat": 3,
    "bird": 5,
    "horse": 6,
    "car": 4,
    "bus": 4,
    "chair": 8,
    "cup": 10,
    "dining table": 4,
    "sports ball": 16,
    "kite": 3,
}
SKY, GROUND = (150, 195, 235), (110, 160, 90)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """An object of a drawn image.

    Attributes:
        name: What kind of object it is.
        colour: Name of its colour.
        box: xyxy px, whole numbers, inside the image.
        outline: Corners (x, y) px of the polygon that is filled.
    """

    name: str
    colour: str
    box: Box
    outline: tuple[tuple[float, float], ...]

    @property
    def phrase(self) -> str:
        """Colour and name."""
        return f"{self.colour} {self.name}"

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """The polygon in an image of (height, width) px, as (height, width) bool."""
        canvas = Image.new("1", (size[1], size[0]))
        ImageDraw.Draw(canvas).polygon(list(self.outline), fill=1)
        return np.asarray(canvas, bool)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A drawn image and what is in it.

    Attributes:
        image: RGB.
        horizon: Row at which the ground begins, px.
        things: The objects, the hindmost first.
    """

    image: Image.Image
    horizon: int
    things: tuple[Thing, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) px."""
        return self.image.height, self.image.width

    @property
    def caption(self) -> str:
        """A sentence that names the objects."""
        named = [f"{'an' if thing.colour == 'orange' else 'a'} {thing.phrase}" for thing in self.things] or ["nothing"]
        listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
        return f"{listed} on the grass under a blue sky."

    def with_tiny(self, name: str, colour: str) -> "Drawn":
        """The same with an object more, of 5 x 5 px at the top left."""
        box = (2, 2, 7, 7)
        thing = Thing(name=name, colour=colour, box=box, outline=_outline(box, OUTLINES[name]))
        image = self.image.copy()
        ImageDraw.Draw(image).polygon(list(thing.outline), fill=COLOURS[colour])
        return replace(self, image=image, things=(*self.things, thing))


def draw(number: int, size: tuple[int, int], names: list[str] | int, *, stream: int = 0) -> Drawn:
    """Draw an image: the same numbers give the same image.

    The first of three objects or more is large and in the middle, behind the others; the others have a ninth of the image each.
    All of them cover at least 4 % of the image by their boxes, up to rounding.

    Args:
        number: Of the image in its stream.
        size: (height, width) px.
        names: Kinds of objects, at most 9; or how many, to draw them at random.
        stream: Of which data set it is.

    Returns:
        The image with its objects.
    """
    rng = np.random.default_rng([stream, number])
    if isinstance(names, int):
        names = [str(name) for name in rng.choice(list(OUTLINES), names)]
    cells = rng.permutation([0, 1, 2, 3, 5, 6, 7, 8] if 3 <= len(names) < 9 else range(9))
    height, width = size
    image = Image.new("RGB", (width, height), SKY)
    horizon = int(height * rng.uniform(0.4, 0.6))
    brush = ImageDraw.Draw(image)
    brush.rectangle((0, horizon, width, height), fill=GROUND)
    things = []
    for place, name in enumerate(names):
        if place == 0 and 3 <= len(names) < 9:
            window, share = (0.15 * width, 0.15 * height, 0.7 * width, 0.7 * height), (0.65, 0.95)
        else:
            row, column = divmod(int(cells[place]), 3)
            window, share = (column * width / 3, row * height / 3, width / 3, height / 3), (0.65, 1.0)
        box = _box_in(window, rng.uniform(*share, 2), rng.uniform(0, 1, 2))
        colour = str(rng.choice(list(COLOURS)))
        things.append(Thing(name=name, colour=colour, box=box, outline=_outline(box, OUTLINES[name])))
        brush.polygon(list(things[-1].outline), fill=COLOURS[colour])
    return Drawn(image=image, horizon=horizon, things=tuple(things))


def _box_in(window: tuple[float, ...], shares: np.ndarray, offsets: np.ndarray) -> Box:
    """A box of some shares of a window's (x, y, width, height) sides."""
    x, y, width, height = window
    sides = width * shares[0], height * shares[1]
    left, top = x + (width - sides[0]) * offsets[0], y + (height - sides[1]) * offsets[1]
    return math.floor(left), math.floor(top), math.floor(left + sides[0]), math.floor(top + sides[1])


def _outline(box: Box, corners: int) -> tuple[tuple[float, float], ...]:
    """A polygon that touches all sides of the box, half a pixel inside: the box holds the pixels that are filled."""
    turn = math.pi / 4 if corners == 4 else math.pi / 2
    angles = [2 * math.pi * corner / corners - turn for corner in range(corners)]
    points = np.array([[math.cos(angle), math.sin(angle)] for angle in angles])
    points = (points - points.min(0)) / np.ptp(points, axis=0)
    low, high = np.array(box[:2]), np.array(box[2:]) - 1
    return tuple((round(float(x), 2), round(float(y), 2)) for x, y in low + points * (high - low))
