"""Masks as COCO's compressed run lengths: reading, writing, mirroring, cropping.

The form is ``{"size": [height, width], "counts": text}``: run lengths of 0s and 1s in turn, down one column
after another, each number in groups of five bits (low first, the sixth bit says that more follow, characters
from '0'), after the third as the difference to the run two before. Whose mask it is stands in
``records.py``; boxes are in ``boxes.py``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def decode(mask: dict[str, Any]) -> np.ndarray:
    """The mask as an array.

    Args:
        mask: ``{"size": [height, width], "counts": text}``.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: The run lengths do not fill the size.
    """
    height, width = mask["size"]
    runs: list[int] = []
    value, shift = 0, 0
    for byte in mask["counts"].encode("ascii"):
        group = byte - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"mask of size {[height, width]} has runs of {sum(runs)} pixels; give COCO's compressed form")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths of a mask (height, width) of bool, the inverse of :func:`decode`."""
    height, width = mask.shape
    flat = np.asarray(mask, bool).T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)  # the first run counts 0s
    text = bytearray()
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != (-1 if group & 0x10 else 0)
            text.append((group | 0x20 if more else group) + 48)
    return {"size": [height, width], "counts": text.decode("ascii")}


def flip(mask: dict[str, Any]) -> dict[str, Any]:
    """Mirror left to right."""
    return encode(decode(mask)[:, ::-1])


def crop(mask: dict[str, Any], window: Sequence[float]) -> dict[str, Any]:
    """Cut a window out, xyxy in [0, 1] of the mask; its edges are rounded to the mask's pixels."""
    height, width = mask["size"]
    x0, x1 = _span(window[0], window[2], width)
    y0, y1 = _span(window[1], window[3], height)
    return encode(decode(mask)[y0:y1, x0:x1])


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    first = min(round(low * size), size - 1)
    return first, max(first + 1, round(high * size))
