"""COCO-MIG's seven colours: ranges of HSV in the whole numbers of 8-bit pictures, and how much of an object lies in one.

What an object's pixels are is the caller's to say.
"""

import numpy as np

# Lowest and highest (hue in 0..180, saturation and value in 0..255), ends included; red has two ranges.
COLOURS: dict[str, tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...]] = {
    "red": (((0, 43, 35), (6, 255, 255)), ((156, 43, 35), (180, 255, 255))),
    "blue": (((78, 43, 35), (124, 255, 255)),),
    "green": (((35, 43, 35), (77, 255, 255)),),
    "yellow": (((20, 43, 35), (34, 255, 255)),),
    "black": (((0, 0, 0), (180, 255, 35)),),
    "white": (((0, 0, 221), (180, 43, 255)),),
    "brown": (((6, 43, 35), (25, 255, 255)),),
}


def hsv(image: np.ndarray) -> np.ndarray:
    """Hue, saturation and value as OpenCV gives them for 8-bit pictures.

    Args:
        image: (..., 3) uint8 RGB.

    Returns:
        (..., 3) int64: hue in 0..179 (half degrees), saturation and value in 0..255.
    """
    red, green, blue = (image[..., channel].astype(np.int64) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    # In fixed point of 12 bits, as there; 0 divided by 0 is 0.
    whole, half = 1 << 12, 1 << 11
    saturation = (spread * np.rint(255 * whole / np.maximum(value, 1)).astype(np.int64) + half) >> 12
    sixth = np.rint(180 * whole / (6 * np.maximum(spread, 1))).astype(np.int64)
    turn = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    hue = (turn * sixth + half) >> 12
    return np.stack([np.where(hue < 0, hue + 180, hue), saturation, value], axis=-1)


def share_of_colour(image: np.ndarray, mask: np.ndarray, colour: str) -> float:
    """How much of a mask has a colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool.
        colour: One of `COLOURS`.

    Returns:
        The share of the mask's pixels in the colour's ranges; 0 of an empty mask.

    Source:
        Zhou et al. 2024, MIGC, and the ranges of its benchmark's evaluation.
    """
    pixels = hsv(image[mask])
    if not len(pixels):
        return 0.0
    inside = [((pixels >= low) & (pixels <= high)).all(-1) for low, high in COLOURS[colour]]
    return float(np.any(inside, axis=0).mean())
