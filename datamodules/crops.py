"""Which window of an image becomes its square: the centre, or one drawn from (seed, position).

Windows are whole pixels of the image as it is stored, so that boxes and masks move exactly. Scaling a window, and moving the
scene along, is in `transforms.py`.
"""

import math
from collections.abc import Sequence

from datamodules.order import crop_draws

CROPS = ("center", "random", "random_resized")
ATTEMPTS = 10  # as torchvision and albumentations have it

Window = tuple[int, int, int, int]
"""(top, left, height, width) px."""


def center_window(size: tuple[int, int]) -> Window:
    """The centre square of an image of (height, width) px."""
    height, width = size
    side = min(size)
    return (height - side) // 2, (width - side) // 2, side, side


def random_window(size: tuple[int, int], *, seed: int, position: int) -> Window:
    """A square of an image's short side, its place along the long side uniform: as scaling that side and then cropping.

    Args:
        size: (height, width) px.
        seed: With the position it decides the place.
        position: Of the sample in the stream of samples.

    Returns:
        The window.
    """
    side = min(size)
    down, across = crop_draws(seed, position, 2)
    return _place(size[0] - side, down), _place(size[1] - side, across), side, side


def random_resized_window(
    size: tuple[int, int], *, scale: Sequence[float], ratio: Sequence[float], seed: int, position: int
) -> Window:
    """A window of a random share of the image's area, in random proportions.

    Where ten draws give none that fits, as for wide images and a large share, it is the largest central window in the nearest
    proportions allowed.

    Args:
        size: (height, width) px.
        scale: Least and largest share of the area.
        ratio: Least and largest width over height; its logarithm is uniform.
        seed: With the position it decides the window.
        position: Of the sample in the stream of samples.

    Returns:
        The window.

    Source:
        Szegedy et al. 2015, "Going Deeper with Convolutions", section 6, in the form of torchvision's and albumentations'
        `RandomResizedCrop`.
    """
    height, width = size
    draws = crop_draws(seed, position, 2 * ATTEMPTS + 2)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, proportion in zip(draws[:ATTEMPTS], draws[ATTEMPTS:-2], strict=True):
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(low + proportion * (high - low))
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            return _place(height - rows, draws[-2]), _place(width - columns, draws[-1]), rows, columns
    rows, columns = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    rows, columns = max(1, rows), max(1, columns)
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _place(room: int, draw: float) -> int:
    """One of the places 0 to `room`, of a draw in [0, 1)."""
    return int(draw * (room + 1))
