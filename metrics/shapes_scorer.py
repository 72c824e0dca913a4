"""The exact scorer of the shapes data: reads objects, attributes and relations off a picture, without a model.

An object is found by its colour, because colours are distinct within a scene; shape and pattern are the ones
whose drawing explains its pixels best. Palette and drawings are those of `scenes.shapes`.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image
from scipy import ndimage

from metrics.base import SceneMetric, Value
from scenes.graph import relation_between
from scenes.scene import Scene, SceneObject
from scenes.shapes import CELLS, COLOURS, GROUNDS, PALETTE, PATTERNS, SHAPES, pattern_tone, shape_body

COLUMNS = ("layout_iou", "colour", "shape", "pattern", "relations")

_COLOUR_LIMIT = 0.13  # OKLab distance beyond which a pixel has no colour of the palette
_GREYS = tuple((level, level, level) for level in (70, 105, 140, 170))  # grey wash is no colour, as grounds are not
_SMALLEST_AREA = 10  # blocks of 2 x 2 cells; the smallest object drawn has 24
_SHAPE_LIMIT = 0.6  # IoU with the best drawing below which an object has no shape
_CONTRAST = 0.7  # contrast of the pattern drawings: blurred patterns show less than the full one
_EIGHT = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class FoundObject:
    """What a picture shows in one colour.

    Attributes:
        box: xyxy in [0, 1] of the picture.
        shape: The shape whose drawing fits best, None where none fits.
        pattern: The pattern whose drawing fits best.
    """

    box: tuple[float, float, float, float]
    shape: str | None
    pattern: str


@dataclass(frozen=True, kw_only=True)
class _Region:
    """The largest connected region of a colour: its pixels and their bounding box, px."""

    mask: np.ndarray
    left: int
    top: int
    right: int
    bottom: int

    @property
    def window(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), px."""
        return self.right - self.left, self.bottom - self.top


_LINEAR = np.array(
    [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.arange(256) / 255],
    dtype=np.float32,
)
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=np.float32,
).T
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=np.float32,
).T


def oklab(image: np.ndarray) -> np.ndarray:
    """A picture in OKLab, where equal distances look equally large.

    Args:
        image: (..., 3) uint8 sRGB.

    Returns:
        (..., 3) float32: lightness in [0, 1], green to red, blue to yellow.

    Source:
        Ottosson 2020, A perceptual color space for image processing.
    """
    return np.cbrt(_LINEAR[image] @ _TO_CONES) @ _TO_LAB


@functools.cache
def _palette() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """OKLab entries (E, 3), the colour of each (E,) with -1 for neutral ones, and both tones of each colour (8, 2, 3)."""
    tones = oklab(np.array([PALETTE[colour] for colour in COLOURS], dtype=np.uint8))
    # The mixture of both tones is an entry too: blurred patterns tend to it.
    entries = np.concatenate([tones, tones.mean(axis=1, keepdims=True)], axis=1)
    grounds = oklab(np.array([*GROUNDS, *_GREYS], dtype=np.uint8))
    owners = np.concatenate([np.repeat(np.arange(len(COLOURS)), entries.shape[1]), np.full(len(grounds), -1)])
    return np.concatenate([entries.reshape(-1, 3), grounds]), owners, tones


def _colour_map(lab: np.ndarray) -> np.ndarray:
    """The place in `COLOURS` of each pixel's nearest palette entry; -1 on grounds and far from all entries."""
    entries, owners, _ = _palette()
    flat = lab.reshape(-1, 3)
    squares = (flat**2).sum(axis=1, keepdims=True) - 2 * flat @ entries.T + (entries**2).sum(axis=1)
    nearest = squares.argmin(axis=1)
    colours = owners[nearest]
    colours[squares[np.arange(len(flat)), nearest] > _COLOUR_LIMIT**2] = -1
    return colours.reshape(lab.shape[:-1])


def _largest_region(mask: np.ndarray, smallest: float) -> _Region | None:
    """The 8-connected region with most 2 x 2 blocks, None where that is fewer than `smallest`.

    Blocks are counted and not pixels, because a blurred edge is a line of pixels whose mixed colour is often
    that of another palette entry: red fades to white through pink.
    """
    blocks = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
    if np.count_nonzero(blocks) < smallest:
        return None
    labels = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(mask, _EIGHT, output=labels)
    areas = np.bincount(labels[:-1, :-1][blocks])
    label = int(areas.argmax())
    if areas[label] < smallest:
        return None
    region = labels == label
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return _Region(
        mask=region,
        left=int(columns[0]),
        top=int(rows[0]),
        right=int(columns[-1]) + 1,
        bottom=int(rows[-1]) + 1,
    )


def _hidden(region: _Region, others: Iterable[_Region]) -> np.ndarray:
    """Pixels of the region's window where another object lies on top, with a rim for its blurred edge."""
    hidden = np.zeros(region.mask.shape, dtype=bool)
    for other in others:
        within = (
            region.left <= other.left
            and region.top <= other.top
            and other.right <= region.right
            and other.bottom <= region.bottom
        )
        if other is not region and within:
            hidden |= other.mask
    window = hidden[region.window]
    if window.any():
        window = ndimage.binary_dilation(window, _EIGHT)
    return window & ~region.mask[region.window]


def _shape_of(region: _Region, hidden: np.ndarray) -> str | None:
    """The shape whose drawing in the region's box has the highest IoU with it, not counting hidden pixels."""
    seen, care = region.mask[region.window], ~hidden
    overlaps = {}
    for shape in SHAPES:
        body = shape_body(shape, *region.size) & care
        overlaps[shape] = np.count_nonzero(body & seen) / np.count_nonzero(body | seen)
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _SHAPE_LIMIT else None


@functools.cache
def _pattern_drawings(side: int, cell: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Every patterned drawing, (K, side, side) float32, 1 where dark, and the pattern of each."""
    period = 2 * cell
    phases = [("striped", (0, down)) for down in range(period)]
    phases += [("checked", (across, down)) for across in range(period) for down in range(cell)]
    drawings = [pattern_tone(name, side, side, cell=cell, phase=phase) for name, phase in phases]
    return np.stack(drawings).astype(np.float32), tuple(name for name, _ in phases)


def _pattern_of(region: _Region, colour: int, lab: np.ndarray) -> str:
    """The pattern whose drawing, at its best phase, explains the tones of the region with least squares.

    The brightness of the whole is free, so that a colour cast does not turn into a pattern.
    """
    bright, dark = _palette()[2][colour]
    axis = (dark - bright) / ((dark - bright) ** 2).sum()
    tone = np.clip((lab[region.mask] - bright) @ axis, 0, 1)
    drawings, names = _pattern_drawings(max(lab.shape[:2]), 2 * max(1, round(len(lab) / CELLS)))
    # Phases are all tried, so the drawings need not start at the region's corner.
    drawings = drawings[:, : lab.shape[0], : lab.shape[1]][:, region.mask]
    drawings = drawings - drawings.mean(axis=1, keepdims=True)
    # |tone|^2 - |tone - c drawing|^2: how much a drawing explains that a plain one does not.
    gains = 2 * _CONTRAST * drawings @ (tone - tone.mean()) - _CONTRAST**2 * (drawings**2).sum(axis=1)
    best = int(gains.argmax())
    return names[best] if gains[best] > 0 else "plain"


def find_objects(image: np.ndarray, colours: Sequence[str] = COLOURS) -> dict[str, FoundObject]:
    """Reads a picture: the largest object of each colour that it shows.

    Args:
        image: (H, W, 3) uint8 RGB.
        colours: The colours to look for.

    Returns:
        The objects found, by colour.
    """
    lab = oklab(image)
    colour_map = _colour_map(lab)
    smallest = _SMALLEST_AREA * image.shape[0] * image.shape[1] / CELLS**2
    regions = {}
    for number in np.unique(colour_map[colour_map >= 0]).tolist():
        if (region := _largest_region(colour_map == number, smallest)) is not None:
            regions[COLOURS[number]] = region
    height, width = colour_map.shape
    return {
        colour: FoundObject(
            box=(region.left / width, region.top / height, region.right / width, region.bottom / height),
            shape=_shape_of(region, _hidden(region, regions.values())),
            pattern=_pattern_of(region, COLOURS.index(colour), lab),
        )
        for colour, region in regions.items()
        if colour in colours
    }


def _asked(item: SceneObject, scene: Scene) -> tuple[str, str | None, str | None]:
    """Colour, shape and pattern that an object's words ask for; None where they leave one open."""
    words = {*item.phrase.split(), item.label, *item.attributes}
    colour, shape, pattern = (
        next((word for word in known if word in words), None) for known in (COLOURS, SHAPES, PATTERNS)
    )
    if colour is None:
        raise ValueError(
            f"scene {scene.id}: phrase: {item.phrase!r} names none of {', '.join(COLOURS)}; "
            "the shapes scorer finds objects by colour, choose another metric for other data"
        )
    return colour, shape, pattern


def _box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """IoU of two xyxy boxes; plain Python, faster than arrays for a single pair."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return shared / (areas - shared)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def score_picture(image: np.ndarray, scene: Scene) -> dict[str, float | None]:
    """Scores one picture against the Scene that it was asked for.

    Args:
        image: (H, W, 3) uint8 RGB.
        scene: Objects are told apart by colour: each colour once.

    Returns:
        Means over the scene's objects, 0 for one that is not found: "layout_iou" (IoU of found and asked
        box), "colour" (it is found), "shape" and "pattern" (the asked one); and "relations", over the asked
        relations (it holds between the found boxes, 0 where either is missing). None where nothing of a kind
        is asked.

    Raises:
        ValueError: A phrase of the scene names no colour of the palette.
    """
    asked = [_asked(item, scene) for item in scene.objects]
    found_by_colour = find_objects(image, [colour for colour, _, _ in asked])
    found = [found_by_colour.get(colour) for colour, _, _ in asked]
    overlaps = [
        _box_iou(item.box, seen.box) if seen else 0.0
        for item, seen in zip(scene.objects, found, strict=True)
        if item.box is not None
    ]
    relations = [
        bool(
            (subject := found[relation.subject])
            and (other := found[relation.object])
            and relation_between(subject.box, other.box) == relation.predicate
        )
        for relation in scene.relations
    ]
    pairs = list(zip(asked, found, strict=True))
    return {
        "layout_iou": _mean(overlaps),
        "colour": _mean([seen is not None for _, seen in pairs]),
        "shape": _mean([seen is not None and seen.shape == shape for (_, shape, _), seen in pairs if shape]),
        "pattern": _mean([seen is not None and seen.pattern == pattern for (_, _, pattern), seen in pairs if pattern]),
        "relations": _mean(relations),
    }


class ShapesScorer(SceneMetric):
    """How well pictures of shapes show their Scenes; see `score_picture` for the columns.

    Args:
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.
    """

    name = "shapes"
    requires = frozenset({"phrases", "boxes"})
    columns = COLUMNS

    def score(self, image: np.ndarray, scene: Scene) -> dict[str, float | None]:
        """The columns for one picture, (H, W, 3) uint8 RGB."""
        return score_picture(image, scene)


class Samples(Protocol):
    """What `ceiling_and_floor` takes: anything that draws (scene, picture) by index, such as the shapes source."""

    def sample(self, index: int) -> tuple[Scene, Image.Image]:
        """One scene with its picture."""
        ...


def ceiling_and_floor(source: Samples, indices: Sequence[int]) -> dict[str, dict[str, Value]]:
    """What a perfect model would score, and one that ignores what it is asked for.

    Args:
        source: Where scenes and pictures come from.
        indices: The samples to use, at least 2.

    Returns:
        "ceiling": the scenes' own pictures; "floor": each scene with the picture of the next one.

    Raises:
        ValueError: Fewer than two indices.
    """
    if len(indices) < 2:
        raise ValueError(f"indices: {len(indices)} of them; give at least 2, the floor pairs different scenes")
    samples = [source.sample(index) for index in indices]
    scenes = [scene for scene, _ in samples]
    images = [np.asarray(picture) for _, picture in samples]
    values = {}
    for bound, pictures in (("ceiling", images), ("floor", [*images[1:], images[0]])):
        scorer = ShapesScorer()
        values[bound] = scorer.compute(scorer.measure(pictures, scenes))
    return values
