"""Parts that read pictures of shapes exactly: labelling with meaning, and without any weights."""

from collections import Counter
from typing import Any

import numpy as np

from labelling.parts import Describer, Detections, Detector, Segmenter, Tagger
from metrics.shapes_scorer import find_objects


class Placed:
    """A part that says when it goes where.

    Args:
        journal: A list that is written to.
    """

    def __init__(self, journal: list | None = None) -> None:
        self.journal = [] if journal is None else journal
        self.counts: Counter[str] = Counter()

    def settings(self) -> dict[str, Any]:
        return {"part": type(self).__name__}

    def to(self, device: Any) -> Any:
        self.journal.append((type(self).__name__, str(device)))
        return self

    def works(self) -> None:
        self.journal.append((type(self).__name__, "works"))


class ShapesTagger(Placed, Tagger):
    def __call__(self, pictures, captions):
        self.works()
        return [
            [f"{colour} {seen.pattern} {seen.shape}" for colour, seen in find_objects(picture).items()]
            for picture in pictures
        ]


class ShapesDetector(Placed, Detector):
    """Finds a phrase by its colour; surest what is largest."""

    def __call__(self, pictures, asked=None):
        self.works()
        found = []
        for picture, tags in zip(pictures, asked or [None] * len(pictures), strict=True):
            seen = find_objects(picture)
            tags = [f"{colour} thing" for colour in seen] if tags is None else tags
            boxes = {tag: seen[tag.split()[0]].box for tag in tags if tag.split()[0] in seen}
            areas = {tag: (box[2] - box[0]) * (box[3] - box[1]) for tag, box in boxes.items()}
            order = sorted(boxes, key=lambda tag: -areas[tag])
            corners = np.array([boxes[tag] for tag in order], np.float32).reshape(-1, 4)
            scores = np.array([areas[tag] for tag in order], np.float32)
            found.append(Detections(boxes=corners, scores=scores, labels=tuple(order)))
        return found


class CornerSegmenter(Placed, Segmenter):
    """Of each box its upper left quarter."""

    def __call__(self, pictures, boxes):
        self.works()
        return [
            np.array([_quarter(picture, box) for box in each]) for picture, each in zip(pictures, boxes, strict=True)
        ]


def _quarter(picture, box):
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = np.multiply(box, (width, height, width, height))
    rows, columns = np.mgrid[:height, :width]
    return (columns >= x0) & (columns < (x0 + x1) / 2) & (rows >= y0) & (rows < (y0 + y1) / 2)


class SizeDescriber(Placed, Describer):
    """Says how large a picture it was shown, and what colour its middle has."""

    def __call__(self, pictures, tags):
        self.works()
        return [
            f"{tag} in {picture.shape[0]} by {picture.shape[1]}, {tuple(picture[picture.shape[0] // 2, 0])}"
            for picture, tag in zip(pictures, tags, strict=True)
        ]
