"""What a scene is made of: one object, one relation between two, the frame that the boxes are fractions of.

``scene.py`` puts them together and is where to import them from; what they must satisfy is in ``checks.py``.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from scenes.checks import SceneError, as_box, as_mask, as_number, whole_numbers

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One thing in the picture.

    Attributes:
        phrase: Text of the object, such as ``red striped circle``; never empty.
        label: The noun alone (``circle``); empty where unknown.
        attributes: What the phrase says of the noun (``red``, ``striped``).
        box: xyxy in [0, 1] of the scene's current frame, or None where the layout does not place the object.
        description: A rich sentence about the object.
        score: Confidence of whoever found the object.
        mask: COCO's compressed run lengths ``{"size": [height, width], "counts": str}``, over the current
            frame in any resolution (``masks.py``).
        is_crowd: Whether the box holds many of the thing (COCO's ``iscrowd``).
    """

    phrase: str
    label: str = ""
    attributes: tuple[str, ...] = ()
    box: Box | None = None
    description: str = ""
    score: float | None = None
    mask: dict[str, Any] | None = field(default=None, hash=False)
    is_crowd: bool = False

    def __post_init__(self) -> None:
        """Bring lists to tuples and numbers to floats; what does not go there is left for ``Scene.check``."""
        if self.box is not None:
            object.__setattr__(self, "box", as_box(self.box))
        if isinstance(self.attributes, list):
            object.__setattr__(self, "attributes", tuple(self.attributes))
        if self.score is not None:
            object.__setattr__(self, "score", as_number(self.score))
        if self.mask is not None:
            object.__setattr__(self, "mask", as_mask(self.mask))


@dataclass(frozen=True, kw_only=True)
class Relation:
    """``objects[subject] predicate objects[object]``: both numbers are places in ``Scene.objects``."""

    subject: int
    predicate: str
    object: int


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Which part of the source picture the boxes are fractions of.

    Attributes:
        original: (height, width) of the source picture in pixels.
        crop: (top, left, height, width) of the part in use, in pixels of the source; the whole if not given.
        target: (height, width) in pixels that this part is scaled to; its own size if not given.

    Raises:
        SceneError: A size is not a positive whole number, or the crop leaves the picture.
    """

    original: tuple[int, int]
    crop: tuple[int, int, int, int] = None  # pyright: ignore[reportAssignmentType]
    target: tuple[int, int] = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        """Fill what was left out and check."""
        original = whole_numbers(self.original, 2, "frame: original")
        crop = whole_numbers((0, 0, *original) if self.crop is None else self.crop, 4, "frame: crop")
        target = whole_numbers(crop[2:] if self.target is None else self.target, 2, "frame: target")
        for name, value in (("original", original), ("crop", crop), ("target", target)):
            object.__setattr__(self, name, value)
        top, left, height, width = self.crop
        for name, (h, w) in (("original", self.original), ("crop", (height, width)), ("target", self.target)):
            if h < 1 or w < 1:
                raise SceneError(f"frame: {name}: {getattr(self, name)} has no area; give sizes of at least 1 pixel")
        if top < 0 or left < 0 or top + height > self.original[0] or left + width > self.original[1]:
            raise SceneError(
                f"frame: crop: {self.crop} leaves the picture of {self.original} (height, width); "
                "give (top, left, height, width) in pixels of the original"
            )

    def cut(self, top: int, left: int, height: int, width: int) -> "Frame":
        """The frame of a window given in pixels of the current target.

        Args:
            top: First row of the window.
            left: First column of the window.
            height: Rows of the window.
            width: Columns of the window.

        Returns:
            The frame; where it lies in the source is rounded to whole pixels.

        Raises:
            SceneError: The window leaves the target.
        """
        if not (0 <= top < top + height <= self.target[0] and 0 <= left < left + width <= self.target[1]):
            raise SceneError(
                f"frame: crop: the window of top {top}, left {left}, height {height}, width {width} leaves "
                f"the target of {self.target} (height, width); give pixels of the current target"
            )
        rows, columns = self.crop[2] / self.target[0], self.crop[3] / self.target[1]
        size = max(1, round(height * rows)), max(1, round(width * columns))
        corner = (
            min(self.crop[0] + round(top * rows), self.original[0] - size[0]),
            min(self.crop[1] + round(left * columns), self.original[1] - size[1]),
        )
        return Frame(original=self.original, crop=corner + size, target=(height, width))

    def flip(self) -> "Frame":
        """The same part of the mirrored source picture."""
        top, left, height, width = self.crop
        return replace(self, crop=(top, self.original[1] - left - width, height, width))
