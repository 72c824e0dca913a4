"""The exact scorer of the shapes data: reads objects, attributes and relations off a picture, without a model.

An object is found by its colour, because colours are distinct within a scene; shape and pattern are the ones
whose drawing explains its pixels best. Palette and drawings are those of `datamodules.sources.shapes`.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage

from datamodules.sources.shapes import (
    CELLS,
    COLOURS,
    GROUNDS,
    PALETTE,
    PATTERNS,
    SHAPES,
    Shapes,
    pattern_tone,
    shape_body,
)
from metrics.base import SceneMetric, Value
from scenes.graph import relation_between
from scenes.scene import Scene, SceneObject

COLUMNS = ("layout_iou", "colour", "shape", "pattern", "relations")

_COLOUR_LIMIT = 0.13  # OKLab distance beyond which a pixel has no colour of the palette
_SMALLEST_AREA = 16  # cells; the smallest object that is drawn covers 36
_SHAPE_LIMIT = 0.6  # IoU with the best drawing below which an object has no shape
_CONTRAST = 0.7  # contrast of the pattern drawings: blurred patterns show less than the full one
_EIGHT = np.ones((3, 3), dtype=bool)
