"""From a stored record to a training sample: size, mirroring, value range; the Scene moves along.

Whether a picture is mirrored depends on (seed, position) alone, so a resumed run sees what an unbroken one
sees. Nothing here draws from a generator of the process. Legend: H = W = resolution.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from datamodules.order import flips
from datamodules.shards import Record
from scenes.scene import Frame, Scene


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a model takes of one record.

    Attributes:
        image: (3, H, W) float32 in [-1, 1].
        scene: The scene in the frame of that picture.
        position: Where the sample stands in the stream of samples.
        dropped: Objects that went because the crop left too little of them.
    """

    image: torch.Tensor
    scene: Scene
    position: int
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class SceneTransform:
    """Makes samples of records.

    Attributes:
        resolution: Height and width of the pictures that come out, px.
        flip: Whether half of the samples are mirrored left to right, picture and scene together.
        seed: Seed of that choice.
    """

    resolution: int
    flip: bool = False
    seed: int = 0

    def __call__(self, record: Record, position: int) -> Sample:
        """The sample at a position of the stream."""
        image, scene, dropped = centre_square(record.image, record.scene, self.resolution)
        if self.flip and flips(self.seed, position):
            image, scene = image[:, ::-1], scene.flip()
        return Sample(image=to_tensor(image), scene=scene, position=position, dropped=dropped)


def centre_square(image: np.ndarray, scene: Scene, resolution: int) -> tuple[np.ndarray, Scene, int]:
    """Scale the short side to `resolution` and cut the centre out; a picture of that size stays as it is.

    Args:
        image: (height, width, 3) uint8.
        scene: The scene in the frame of that picture.
        resolution: Height and width that come out, px.

    Returns:
        (resolution, resolution, 3) uint8, the scene moved along, and how many of its objects went.

    Raises:
        ValueError: The scene's frame is of another size than the picture.
    """
    height, width = image.shape[:2]
    if (height, width) == (resolution, resolution):
        return image, scene, 0
    frame = scene.frame or Frame(original=(height, width))
    if frame.target != (height, width):
        raise ValueError(
            f"scene {scene.id!r}: frame: target {frame.target} is not the picture's (height, width) "
            f"{(height, width)}; make the shards again with prepare.py"
        )
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    scene, dropped = replace(scene, frame=frame), 0
    if height != width:
        scene, dropped = scene.crop(top, left, side, side)
    scene = replace(scene, frame=replace(scene.frame, target=(resolution, resolution)))
    window = (left, top, left + side, top + side)
    resized = Image.fromarray(image).resize((resolution, resolution), Image.Resampling.BICUBIC, box=window)
    return np.asarray(resized), scene, dropped


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 in 0..255 to (3, H, W) float32 in [-1, 1]: 0 is -1 and 255 is 1, exactly."""
    planes = np.array(image.transpose(2, 0, 1), order="C")
    return torch.from_numpy(planes).float().div_(127.5).sub_(1)
