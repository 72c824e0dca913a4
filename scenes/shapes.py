"""How shapes look: palette, words, bodies and patterns, shared by the source that draws them and the scorer that reads them.

Pure drawing, no layouts: those are in `datamodules.sources.shapes`. Layouts are on a grid of 32 x 32 cells whatever the size of
the picture.
"""

import functools

import numpy as np

CELLS = 32

# (bright, dark) RGB of each colour; the two tones make stripes and checks. Both tones and their mixture keep
# 0.12 of distance in OKLab to every other colour and ground, so that an object is found by its colour.
PALETTE: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((240, 36, 72), (108, 2, 30)),
    "green": ((34, 190, 58), (0, 80, 76)),
    "blue": ((28, 82, 250), (4, 14, 158)),
    "yellow": ((255, 226, 66), (152, 148, 2)),
    "purple": ((143, 42, 227), (90, 2, 122)),
    "orange": ((255, 126, 28), (126, 77, 14)),
    "cyan": ((48, 186, 237), (29, 119, 163)),
    "pink": ((252, 140, 208), (163, 96, 152)),
}
GROUNDS: tuple[tuple[int, int, int], ...] = ((250, 250, 250), (202, 204, 208), (28, 29, 33))
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "diamond")
PATTERNS = ("plain", "striped", "checked")
PREDICATES = ("left of", "right of", "above", "below", "inside")

VOCABULARY: tuple[str, ...] = (
    *COLOURS,
    *SHAPES,
    *PATTERNS,
    *("a", "an", "and", ","),
    *("left", "right", "of", "above", "below", "inside", "surrounding"),
)


@functools.lru_cache(maxsize=8192)
def shape_body(shape: str, width: int, height: int) -> np.ndarray:
    """The pixels of a shape that fills its box: it touches all four sides.

    Args:
        shape: One of `SHAPES`.
        width: Width of the box, px.
        height: Height of the box, px.

    Returns:
        (height, width) bool, read-only.
    """
    u = np.abs((np.arange(width) + 0.5) / width * 2 - 1)[None, :]
    v = np.abs((np.arange(height) + 0.5) / height * 2 - 1)[:, None]
    if shape == "square":
        body = np.ones((height, width), dtype=bool)
    elif shape == "circle":
        body = u**2 + v**2 <= 1 + 1e-9
    elif shape == "diamond":
        body = u + v <= 1 + 0.5 / width + 0.5 / height + 1e-9
    elif shape == "triangle":
        down = (np.arange(height) + 1)[:, None] / height
        body = u <= np.maximum(down, 1 / width) + 1e-9
    else:
        raise ValueError(f"shape: {shape!r} is unknown; choose one of {', '.join(SHAPES)}")
    body.setflags(write=False)
    return body


@functools.lru_cache(maxsize=8192)
def pattern_tone(
    pattern: str, width: int, height: int, *, cell: int = 2, phase: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Where a pattern is dark.

    Args:
        pattern: One of `PATTERNS`.
        width: Width of the box, px.
        height: Height of the box, px.
        cell: Side of a stripe or of a square of the checker, px: 2 at size 32.
        phase: (right, down) offset of the pattern from the corner of the box, px.

    Returns:
        (height, width) bool, read-only, True where the dark tone shows.
    """
    across = (np.arange(width) + phase[0])[None, :] // cell
    down = (np.arange(height) + phase[1])[:, None] // cell
    if pattern == "plain":
        dark = np.zeros((height, width), dtype=bool)
    elif pattern == "striped":
        dark = np.broadcast_to(down % 2 == 1, (height, width)).copy()
    elif pattern == "checked":
        dark = (across + down) % 2 == 1
    else:
        raise ValueError(f"pattern: {pattern!r} is unknown; choose one of {', '.join(PATTERNS)}")
    dark.setflags(write=False)
    return dark
