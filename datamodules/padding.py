"""White beside or below a picture, so that it becomes square without losing a part of it; its scene moves along.

As the published rich-context evaluation draws COCO. What of a square is not padding tells `content`; who cuts it off
again is in `sampling/framing.py`.
"""

from dataclasses import replace

import numpy as np
from PIL import Image

from scenes import masks
from scenes.scene import Frame, Scene

WHITE = (255, 255, 255)


def padded(image: np.ndarray | Image.Image, scene: Scene) -> tuple[np.ndarray | Image.Image, Scene]:
    """The picture in the upper left of a white square over its longer side; one that is square stays as it is.

    Args:
        image: (height, width, 3) uint8, or the same as an RGB picture.
        scene: The scene in the frame of that picture, or without a frame.

    Returns:
        The square, and the scene in its frame.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height, width = size = picture.height, picture.width
    scene = scene if scene.frame is not None else replace(scene, frame=Frame(original=size))
    if height == width:
        return image, scene
    square = Image.new("RGB", (max(size), max(size)), WHITE)
    square.paste(picture, (0, 0))
    return square, padded_scene(scene)


def padded_scene(scene: Scene) -> Scene:
    """The scene in the frame of the square that `padded` makes of its picture; without a frame it is taken to be of a square.

    Args:
        scene: The scene in the frame of its picture.

    Returns:
        The scene, whose frame begins with the square: that is the picture from here on.
    """
    if scene.frame is None or scene.frame.target[0] == scene.frame.target[1]:
        return scene
    height, width = scene.frame.target
    side = max(height, width)
    across, down = width / side, height / side
    objects = tuple(
        replace(
            item,
            box=None
            if item.box is None
            else (item.box[0] * across, item.box[1] * down, item.box[2] * across, item.box[3] * down),
            mask=None if item.mask is None else _padded_mask(item.mask, down, across),
        )
        for item in scene.objects
    )
    return replace(scene, objects=objects, frame=Frame(original=(side, side)))


def content(size: tuple[int, int], side: int) -> tuple[int, int]:
    """How much of a padded square is the picture, with the published rounding: the padding is rounded down.

    Args:
        size: (height, width) of the picture.
        side: Of the square, px.

    Returns:
        Rows and columns from the upper left.
    """
    longer = max(size)
    rows, columns = (side - int((longer - extent) / longer * side) for extent in size)
    return rows, columns


def _padded_mask(mask: dict, down: float, across: float) -> dict:
    """The mask with nothing beside or below it."""
    inside = masks.decode(mask)
    height, width = inside.shape
    rows, columns = round(height / down) - height, round(width / across) - width
    return masks.encode(np.pad(inside, ((0, rows), (0, columns))))
