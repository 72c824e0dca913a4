"""Shapes, the embedded data set: coloured, patterned shapes on a plain ground, with exact layouts.

Here live the palette, the renderer (also used by the exact scorer, `metrics.shapes_scorer`) and the source.
Every picture is a pure function of (seed, index), so nothing is stored. Layouts are drawn on a grid of
32 x 32 cells whatever the size of the picture: boxes are the same at size 32 and 64, and lie on whole pixels
at both. What relations mean is in `scenes.graph`.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from datamodules.sources.base import Source
from scenes.graph import relation_between
from scenes.masks import encode
from scenes.records import Box
from scenes.scene import Frame, Relation, Scene, SceneObject
from scenes.shapes import CELLS, COLOURS, GROUNDS, PALETTE, PATTERNS, SHAPES, pattern_tone, shape_body

_DIRECTIONS = ("right of", "below", "left of", "above")
_NESTED_RATE = 0.35
_LARGEST_SIDE = {1: 18, 2: 18, 3: 15, 4: 12}
_SMALLEST_SIDE = 8
_OUTER_SIDES = {2: (16, 24), 3: (15, 20), 4: (15, 17)}
# Larger inner objects hardly ever fit the outer body; not trying them keeps drawing fast.
_INNER_SHARE = {"square": 1.0, "circle": 0.9, "triangle": 0.72, "diamond": 0.76}
_TRIES = 16
_RIM = 2  # cells of the outer object that stay visible around an inner one
_GAP = 1  # cells between objects that are not nested, and to the border
_TAN_NEAR_DIAGONAL = float(np.tan(np.deg2rad(45 - 8)))


@functools.lru_cache(maxsize=16384)
def _sprite(colour: str, shape: str, pattern: str, width: int, height: int, cell: int) -> np.ndarray:
    """The pixels of an object's body in raster order, (K, 3) uint8."""
    tones = np.array(PALETTE[colour], dtype=np.uint8)
    dark = pattern_tone(pattern, width, height, cell=cell)
    return tones[dark[shape_body(shape, width, height)].astype(np.intp)]


class _Placed(NamedTuple):
    """An object of a layout, in cells. A tuple because layouts are found by trying many."""

    shape: str
    left: int
    top: int
    width: int
    height: int
    nested: bool


class _Draws:
    """Scalar draws from one numpy Generator, taken in blocks; one call for each would be slow."""

    def __init__(self, seed: int, index: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
        self._pool: list[float] = []

    def uniform(self) -> float:
        """Uniform in [0, 1)."""
        if not self._pool:
            self._pool = self._generator.random(128).tolist()
        return self._pool.pop()

    def integer(self, low: int, high: int) -> int:
        """Uniform over low..high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def choice(self, options: Sequence[str]) -> str:
        """One of the options."""
        return options[int(self.uniform() * len(options))]

    def shuffled(self, options: Sequence, take: int | None = None) -> list:
        """The first `take` of a random order."""
        items = list(options)
        take = len(items) if take is None else take
        for i in range(take):
            j = self.integer(i, len(items) - 1)
            items[i], items[j] = items[j], items[i]
        return items[:take]


def _sides(draws: _Draws, shape: str, low: int, high: int) -> tuple[int, int]:
    """Width and height in low..high; nearly equal for circles and squares, at most 4 : 3 for the others."""
    width = draws.integer(low, high)
    if shape in ("circle", "square"):
        slack = max(1, width // 8)
        return width, draws.integer(max(low, width - slack), min(high, width + slack))
    return width, draws.integer(max(low, -(-3 * width // 4)), min(high, 4 * width // 3))


@functools.lru_cache(maxsize=8192)
def _spans(shape: str, width: int, height: int, grow: int) -> tuple[tuple[int, int], ...]:
    """First and last cell of each row of a body grown by `grow` cells on all sides, relative to its box."""
    body = np.pad(shape_body(shape, width, height), grow)
    rows = [np.flatnonzero(body[max(0, y - grow) : y + grow + 1].any(axis=0)) for y in range(len(body))]
    return tuple((int(row[0]) - 2 * grow, int(row[-1])) for row in rows)


def _fits_inside(inner: _Placed, outer: _Placed) -> bool:
    """Whether `_RIM` cells of the outer body remain on every side of the inner body."""
    across, down = inner.left - outer.left, inner.top - outer.top - _RIM
    spans = _spans(outer.shape, outer.width, outer.height, 0)
    if down < 0 or down + inner.height + 2 * _RIM > outer.height:
        return False
    for y, (first, last) in enumerate(_spans(inner.shape, inner.width, inner.height, _RIM), start=down):
        if first + across < spans[y][0] or last + across > spans[y][1]:
            return False
    return True


def _is_free(candidate: _Placed, placed: list[_Placed]) -> bool:
    """Whether a candidate keeps its distance and has one clear direction to each object placed before it."""
    if candidate.nested:
        return _fits_inside(candidate, placed[0])
    _, left, top, width, height, _ = candidate
    for _, other_left, other_top, other_width, other_height, _ in placed:
        if (
            left < other_left + other_width + _GAP
            and other_left < left + width + _GAP
            and top < other_top + other_height + _GAP
            and other_top < top + height + _GAP
        ):
            return False
        across = abs(2 * (left - other_left) + width - other_width)
        down = abs(2 * (top - other_top) + height - other_height)
        if across > _TAN_NEAR_DIAGONAL * down and down > _TAN_NEAR_DIAGONAL * across:
            return False
    return True


def _try_layout(draws: _Draws, count: int, nested: bool) -> list[_Placed] | None:
    """One attempt at a layout: [outer, inner, others...] when nested, None where an object finds no place."""
    placed: list[_Placed] = []
    for number in range(count):
        shape = draws.choice(SHAPES)
        is_inner = nested and number == 1
        low, high = _OUTER_SIDES[count] if nested and number == 0 else (_SMALLEST_SIDE, _LARGEST_SIDE[count])
        left, top, right, bottom = _GAP, _GAP, CELLS - _GAP, CELLS - _GAP
        if is_inner:
            outer = placed[0]
            high = int(min(outer.width, outer.height) * _INNER_SHARE[outer.shape]) - 2 * _RIM
            if high < low:
                return None
            left, top = outer.left + _RIM, outer.top + _RIM
            right, bottom = outer.left + outer.width - _RIM, outer.top + outer.height - _RIM
        width, height = _sides(draws, shape, low, high)
        columns, rows = right - width - left + 1, bottom - height - top + 1
        for _ in range(_TRIES):  # the hot loop of the source
            x, y = left + int(draws.uniform() * columns), top + int(draws.uniform() * rows)
            candidate = _Placed(shape, x, y, width, height, is_inner)
            if _is_free(candidate, placed):
                placed.append(candidate)
                break
        else:
            return None
    return placed


def _draw_layout(draws: _Draws, count: int) -> list[_Placed]:
    nested = count > 1 and draws.uniform() < _NESTED_RATE
    while (layout := _try_layout(draws, count, nested)) is None:
        pass
    return layout


def _box_of(placed: _Placed) -> Box:
    """The xyxy box in [0, 1]; exact, because `CELLS` is a power of two."""
    _, left, top, width, height, _ = placed
    return left / CELLS, top / CELLS, (left + width) / CELLS, (top + height) / CELLS


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def caption_of(phrases: Sequence[str]) -> str:
    """The sentence that names objects in the order given: "a red striped circle and a blue plain square"."""
    named = [_article(phrase) for phrase in phrases]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _relations(boxes: Sequence[Box], inner: int | None, outer: int | None) -> tuple[Relation, ...]:
    """One relation for each pair; its subject is the earlier object, or the inner one of a nested pair."""
    relations = []
    for first in range(len(boxes)):
        for second in range(first + 1, len(boxes)):
            pair = (second, first) if (second, first) == (inner, outer) else (first, second)
            predicate = relation_between(boxes[pair[0]], boxes[pair[1]])
            relations.append(Relation(subject=pair[0], predicate=predicate, object=pair[1]))
    return tuple(relations)


class Shapes(Source):
    """Pictures of 1 to 4 shapes, each of another colour, with their layouts; drawn on demand.

    Args:
        count: Number of samples.
        size: Side of the picture, px: 32 or 64.
        seed: Seed of the stream of pictures; 0 is a seed like any other.
        start: Index of the first sample within the stream: disjoint ranges give disjoint data.
        min_objects: Fewest objects of a picture, at least 1.
        max_objects: Most objects of a picture, at most 4.

    Raises:
        ValueError: A setting is outside these ranges.
    """

    provides: ClassVar[frozenset[str]] = frozenset(
        {"image", "caption", "boxes", "phrases", "attributes", "relations", "masks"}
    )
    name = "shapes"
    image_format = "png"  # JPEG would smear the two-pixel patterns

    def __init__(
        self,
        *,
        count: int,
        size: int = 32,
        seed: int = 0,
        start: int = 0,
        min_objects: int = 1,
        max_objects: int = 4,
    ) -> None:
        for field, value in (("count", count), ("seed", seed), ("start", start)):
            if value < 0:
                raise ValueError(f"{field}: {value} is negative; give 0 or more")
        if size not in (CELLS, 2 * CELLS):
            raise ValueError(f"size: {size} px is not available; choose {CELLS} or {2 * CELLS}")
        if not 1 <= min_objects <= max_objects <= 4:
            raise ValueError(f"min_objects, max_objects: {min_objects}, {max_objects} do not fit; 1 <= min <= max <= 4")
        self.count, self.size, self.seed, self.start = count, size, seed, start
        self.min_objects, self.max_objects = min_objects, max_objects

    def __len__(self) -> int:
        """Number of samples."""
        return self.count

    def __iter__(self) -> Iterator[tuple[Scene, Image.Image]]:
        """Yields the samples in order of their index."""
        return map(self.sample, range(self.count))

    def span(self, start: int, stop: int) -> Iterator[tuple[Scene, Image.Image]]:
        """As `Source`: no other sample is drawn.

        Args:
            start: First index.
            stop: Index behind the last.

        Returns:
            The samples.
        """
        return map(self.sample, range(start, min(stop, self.count)))

    def __getitem__(self, index: int) -> tuple[Scene, Image.Image]:
        """The same as `sample`."""
        return self.sample(index)

    def sample(self, index: int) -> tuple[Scene, Image.Image]:
        """Draws one sample, the same at every call.

        Args:
            index: 0 to count - 1; the sample is number start + index of the stream.

        Returns:
            The scene, and its RGB picture of size x size px.

        Raises:
            IndexError: The index is outside that range.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"index: {index} is outside 0..{self.count - 1}; raise count to reach it")
        number = self.start + index
        draws = _Draws(self.seed, number)
        count = draws.integer(self.min_objects, self.max_objects)
        layout = _draw_layout(draws, count)
        colours = draws.shuffled(COLOURS, count)
        looks = [(colour, draws.choice(PATTERNS)) for colour in colours]
        canvas, masks = self._render(layout, looks, GROUNDS[draws.integer(0, len(GROUNDS) - 1)])

        order = draws.shuffled(range(count))
        boxes = [_box_of(layout[i]) for i in order]
        objects = [
            SceneObject(
                phrase=f"{looks[i][0]} {looks[i][1]} {layout[i].shape}",
                label=layout[i].shape,
                attributes=looks[i],
                box=box,
                mask=encode(masks[i]),
            )
            for i, box in zip(order, boxes, strict=True)
        ]
        nested = count > 1 and layout[1].nested
        scene = Scene(
            id=f"shapes-{self.seed}-{number:08d}",
            caption=caption_of([item.phrase for item in draws.shuffled(objects)]),
            objects=tuple(objects),
            relations=_relations(
                boxes,
                order.index(1) if nested else None,
                order.index(0) if nested else None,
            ),
            frame=Frame(original=(self.size, self.size)),
            source=self.name,
        )
        return scene, Image.fromarray(canvas)

    def _render(
        self, layout: Sequence[_Placed], looks: Sequence[tuple[str, str]], ground: tuple[int, int, int]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The picture (size, size, 3) uint8 and the visible mask (size, size) bool of each object."""
        scale = self.size // CELLS
        canvas = np.empty((self.size, self.size, 3), dtype=np.uint8)
        canvas[:] = ground
        masks = []
        for placed, (colour, pattern) in zip(layout, looks, strict=True):
            width, height = placed.width * scale, placed.height * scale
            left, top = placed.left * scale, placed.top * scale
            window = (slice(top, top + height), slice(left, left + width))
            body = shape_body(placed.shape, width, height)
            canvas[window][body] = _sprite(colour, placed.shape, pattern, width, height, 2 * scale)
            mask = np.zeros((self.size, self.size), dtype=bool)
            mask[window] = body
            if placed.nested:  # the inner object is drawn right after its outer one, and hides part of it
                masks[0] &= ~mask
            masks.append(mask)
        return canvas, masks
