"""From a stored record to a training sample: size, mirroring, value range, caption; the Scene moves along.

Whether a picture is mirrored and which caption it has depends on (seed, position) alone, so a resumed run sees
what an unbroken one sees. Nothing here draws from a generator of the process. Legend: H = W = resolution, (C, h, w)
a latent.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from datamodules.order import choice, flips
from datamodules.shards import Record
from scenes.scene import Frame, Scene

CAPTIONS = ("first", "any")
FLIPPED_LATENT = "the shards hold latents, which cannot be mirrored; set data.flip=false or prepare pictures"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a model takes of one record.

    Attributes:
        scene: The scene in the frame of the picture.
        position: Where the sample stands in the stream of samples.
        image: (3, H, W) float32 in [-1, 1]; None where there is a latent.
        latent: (C, h, w) float32 as the denoiser takes it; None where there is a picture.
        dropped: Objects that went because the crop left too little of them.
    """

    scene: Scene
    position: int
    image: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class SceneTransform:
    """Makes samples of records.

    Attributes:
        resolution: Height and width of the pictures that come out, px. A latent stays as it is.
        flip: Whether half of the samples are mirrored left to right, picture and scene together.
        seed: Seed of that choice and of the captions'.
        min_area: Objects whose box covers less than this share of what is left of the picture go.
        caption: Where a source kept several captions: "first" takes the scene's own, "any" draws one.

    Raises:
        ValueError: Another word for the caption, or a share outside [0, 1).
    """

    resolution: int
    flip: bool = False
    seed: int = 0
    min_area: float = 0.01
    caption: str = "first"

    def __post_init__(self) -> None:
        """Refuse what no sample can be made with."""
        if self.caption not in CAPTIONS:
            raise ValueError(f"data.caption={self.caption}: no such choice; take {' or '.join(CAPTIONS)}")
        if not 0 <= self.min_area < 1:
            raise ValueError(f"data.min_area={self.min_area}: give a share of the picture, from 0 to below 1")

    def __call__(self, record: Record, position: int) -> Sample:
        """The sample at a position of the stream.

        Args:
            record: What is stored.
            position: Where it stands; it decides mirroring and caption.

        Returns:
            The sample, a latent as float32.

        Raises:
            ValueError: The record is a latent, and samples are to be mirrored.
        """
        record = replace(record, scene=self._captioned(record.scene, position))
        if record.latent is not None:
            if self.flip:
                raise ValueError(f"data.flip=true: {FLIPPED_LATENT}")
            scene, dropped = record.scene.without_small(self.min_area)
            latent = torch.from_numpy(record.latent).float()
            return Sample(latent=latent, scene=scene, position=position, dropped=dropped)
        image, scene, dropped = centre_square(record.image, record.scene, self.resolution, min_area=self.min_area)
        if self.flip and flips(self.seed, position):
            image, scene = image[:, ::-1], scene.flip()
        return Sample(image=to_tensor(image), scene=scene, position=position, dropped=dropped)

    def _captioned(self, scene: Scene, position: int) -> Scene:
        """The scene with the caption that it has at this position."""
        captions = scene.provenance.get("captions") if self.caption == "any" else None
        return replace(scene, caption=captions[choice(self.seed, position, len(captions))]) if captions else scene


def centre_square(
    image: np.ndarray, scene: Scene, resolution: int, *, min_area: float = 0.01
) -> tuple[np.ndarray, Scene, int]:
    """Scale the short side to `resolution` and cut the centre out; a picture of that size stays as it is.

    Args:
        image: (height, width, 3) uint8.
        scene: The scene in the frame of that picture.
        resolution: Height and width that come out, px.
        min_area: Objects whose box covers less than this share of the centre go.

    Returns:
        (resolution, resolution, 3) uint8, the scene moved along, and how many of its objects went.

    Raises:
        ValueError: The scene's frame is of another size than the picture.
    """
    height, width = image.shape[:2]
    if (height, width) == (resolution, resolution):
        return image, *scene.without_small(min_area)
    frame = scene.frame or Frame(original=(height, width))
    if frame.target != (height, width):
        raise ValueError(
            f"scene {scene.id!r}: frame: target {frame.target} is not the picture's (height, width) "
            f"{(height, width)}; make the shards again with prepare.py"
        )
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    scene = replace(scene, frame=frame)
    if height != width:
        scene, dropped = scene.crop(top, left, side, side, min_area=min_area)
    else:
        scene, dropped = scene.without_small(min_area)
    scene = replace(scene, frame=replace(scene.frame, target=(resolution, resolution)))
    window = (left, top, left + side, top + side)
    resized = Image.fromarray(image).resize((resolution, resolution), Image.Resampling.BICUBIC, box=window)
    return np.asarray(resized), scene, dropped


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 in 0..255 to (3, H, W) float32 in [-1, 1]: 0 is -1 and 255 is 1, exactly."""
    planes = np.array(image.transpose(2, 0, 1), order="C")
    return torch.from_numpy(planes).float().div_(127.5).sub_(1)
