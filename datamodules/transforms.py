"""From a stored record to a training sample: size, mirroring, value range, caption; the Scene moves along.

Whether a picture is mirrored, which caption it has and which latent is drawn from stored moments depends on
(seed, position) alone, so a resumed run sees what an unbroken one sees. Nothing here draws from a generator of the
process. Legend: H = W = resolution, (C, h, w) a latent.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from datamodules.order import choice, flips, latent_noise
from datamodules.padding import padded, padded_scene
from datamodules.shards import Record
from scenes.graph import related_by_boxes
from scenes.scene import Frame, Scene

CAPTIONS = ("first", "any")
RESIZES = ("crop", "squash", "pad")
RELATIONS = ("stored", "boxes")
POSTERIORS = ("sample", "mode")
FLIPPED_LATENT = (
    "the shards hold latents, which cannot be mirrored, and none of the mirrored pictures; set data.flip=false, or make latents "
    "of pictures with stage.flipped=true"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a model takes of one record.

    Attributes:
        scene: The scene in the frame of the picture.
        position: Where the sample stands in the stream of samples.
        image: (3, H, W) float32 in [-1, 1]; None where there is a latent.
        latent: (C, h, w) float32 as the denoiser takes it; None where there is a picture.
        dropped: Objects that went because the crop left too little of them.
        fault: What was wrong with the sample in whose place this one stands; None for the sample itself.
    """

    scene: Scene
    position: int
    image: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    dropped: int = 0
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class SceneTransform:
    """Makes samples of records.

    Attributes:
        resolution: Height and width of the pictures that come out, px. A latent stays as it is.
        flip: Whether half of the samples are mirrored left to right, picture and scene together.
        seed: Seed of that choice and of the captions'.
        min_area: Objects whose box covers less than this share of what is left of the picture go.
        caption: Where a source kept several captions: "first" takes the scene's own, "any" draws one.
        resize: How a picture becomes square: "crop" scales its short side and cuts the centre out, "squash" scales both
            sides and keeps all of it, "pad" puts white beside or below it first.
        relations: "stored" takes the scene's own, "boxes" those that the boxes left stand in.
        relations_per_object: Of "boxes": of each object those to its nearest so many others; None is all pairs.
        posterior: What becomes of stored moments: "sample" draws a latent anew at each position, "mode" takes the mean.

    Raises:
        ValueError: Another word for a choice, a share outside [0, 1), or a negative number of relations.
    """

    resolution: int
    flip: bool = False
    seed: int = 0
    min_area: float = 0.01
    caption: str = "first"
    resize: str = "crop"
    relations: str = "stored"
    relations_per_object: int | None = None
    posterior: str = "mode"

    def __post_init__(self) -> None:
        """Refuse what no sample can be made with."""
        words = {"caption": CAPTIONS, "resize": RESIZES, "relations": RELATIONS, "posterior": POSTERIORS}
        for name, choices in words.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"data.{name}={value}: no such choice; take {' or '.join(choices)}")
        if self.relations_per_object is not None and self.relations_per_object < 0:
            raise ValueError(f"data.relations_per_object={self.relations_per_object}: give 0 or more, or null for all")
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
            ValueError: The sample is to be mirrored, and the record is a latent that is not.
        """
        record = replace(record, scene=self._captioned(record.scene, position))
        if record.latent is not None:
            if self.mirrors(position) and not record.mirrored:
                raise ValueError(f"data.flip=true: {FLIPPED_LATENT}")
            scene, dropped = record.scene.without_small(self.min_area)
            scene = self._related(scene)
            latent = self._drawn(record.latent, record.log_variance, position)
            scene = scene.flip() if record.mirrored else scene
            return Sample(latent=latent, scene=scene, position=position, dropped=dropped)
        image, scene, dropped = self.square(record.image, record.scene)
        scene = self._related(scene)
        if self.mirrors(position):
            image, scene = image[:, ::-1], scene.flip()
        return Sample(image=to_tensor(image), scene=scene, position=position, dropped=dropped)

    def mirrors(self, position: int) -> bool:
        """Whether the sample at a position is mirrored."""
        return self.flip and flips(self.seed, position)

    def _drawn(self, mean: np.ndarray, log_variance: np.ndarray | None, position: int) -> torch.Tensor:
        """The latent (C, h, w) float32 at a position, of a stored one or of stored moments."""
        latent = torch.from_numpy(mean).float()
        if log_variance is None or self.posterior == "mode":
            return latent
        noise = torch.from_numpy(latent_noise(self.seed, position, latent.shape))
        return latent + noise * torch.from_numpy(log_variance).float().div_(2).exp_()

    def _captioned(self, scene: Scene, position: int) -> Scene:
        """The scene with the caption that it has at this position."""
        captions = scene.provenance.get("captions") if self.caption == "any" else None
        return replace(scene, caption=captions[choice(self.seed, position, len(captions))]) if captions else scene

    def square(self, image: np.ndarray | Image.Image, scene: Scene) -> tuple[np.ndarray, Scene, int]:
        """As `centre_square` or `squashed`, whichever is asked for; padded first if that is."""
        if self.resize == "pad":
            image, scene = padded(image, scene)
        square = centre_square if self.resize == "crop" else squashed
        return square(image, scene, self.resolution, min_area=self.min_area)

    def scene(self, scene: Scene) -> Scene:
        """What becomes of a scene alone: its square and its relations; never mirrored, under its own caption."""
        scene, _ = squared(scene, self.resolution, resize=self.resize, min_area=self.min_area)
        return self._related(scene)

    def _related(self, scene: Scene) -> Scene:
        """The scene with the relations that are asked for."""
        if self.relations == "stored":
            return scene
        return related_by_boxes(scene, max_per_object=self.relations_per_object)


def centre_square(
    image: np.ndarray | Image.Image, scene: Scene, resolution: int, *, min_area: float = 0.01
) -> tuple[np.ndarray, Scene, int]:
    """Scale the short side to `resolution` and cut the centre out; a picture of that size stays as it is.

    Args:
        image: (height, width, 3) uint8, or the same as an RGB picture.
        scene: The scene in the frame of that picture.
        resolution: Height and width that come out, px.
        min_area: Objects whose box covers less than this share of the centre go.

    Returns:
        (resolution, resolution, 3) uint8, the scene moved along, and how many of its objects went.

    Raises:
        ValueError: The scene's frame is of another size than the picture.
    """
    height, width = size = _size(image)
    if size == (resolution, resolution):
        return np.asarray(image), *scene.without_small(min_area)
    top, left, side = _centre(height, width)
    scene, dropped = squared(_framed(scene, size), resolution, min_area=min_area)
    window = (left, top, left + side, top + side)
    resized = _picture(image).resize((resolution, resolution), Image.Resampling.BICUBIC, box=window)
    return np.asarray(resized), scene, dropped


def squashed(
    image: np.ndarray | Image.Image, scene: Scene, resolution: int, *, min_area: float = 0.01
) -> tuple[np.ndarray, Scene, int]:
    """Scale height and width to `resolution` each, whatever the proportions; boxes stay, being parts of the picture.

    Args:
        image: (height, width, 3) uint8, or the same as an RGB picture.
        scene: The scene in the frame of that picture.
        resolution: Height and width that come out, px.
        min_area: Objects whose box covers less than this share of the picture go.

    Returns:
        (resolution, resolution, 3) uint8, the scene moved along, and how many of its objects went.

    Raises:
        ValueError: The scene's frame is of another size than the picture.
    """
    size = _size(image)
    if size == (resolution, resolution):
        return np.asarray(image), *scene.without_small(min_area)
    scene, dropped = squared(_framed(scene, size), resolution, resize="squash", min_area=min_area)
    resized = _picture(image).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(resized), scene, dropped


def squared(scene: Scene, resolution: int, *, resize: str = "crop", min_area: float = 0.01) -> tuple[Scene, int]:
    """What becomes of a scene when its picture is made square; the picture itself is not needed.

    Args:
        scene: The scene; without a frame its boxes are taken to be of a square.
        resolution: Height and width that come out, px.
        resize: "crop" for the centre square, "squash" for all of the picture, "pad" for all of it with white beside it.
        min_area: Objects whose box covers less than this share of what is left go.

    Returns:
        The scene in its new frame, and how many of its objects went.
    """
    scene = padded_scene(scene) if resize == "pad" else scene
    size = None if scene.frame is None else scene.frame.target
    if scene.frame is None or size is None or size == (resolution, resolution):
        return scene.without_small(min_area)
    height, width = size
    if resize == "crop" and height != width:
        top, left, side = _centre(height, width)
        scene, dropped = scene.crop(top, left, side, side, min_area=min_area)
    else:
        scene, dropped = scene.without_small(min_area)
    assert scene.frame is not None
    return replace(scene, frame=replace(scene.frame, target=(resolution, resolution))), dropped


def _size(image: np.ndarray | Image.Image) -> tuple[int, int]:
    """(height, width) px."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def _picture(image: np.ndarray | Image.Image) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def _centre(height: int, width: int) -> tuple[int, int, int]:
    """(top, left, side) of the centre square, px."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def _framed(scene: Scene, size: tuple[int, int]) -> Scene:
    """The scene with the frame of a picture of (height, width) px; refused where it has that of another size."""
    frame = scene.frame or Frame(original=size)
    if frame.target != size:
        raise ValueError(
            f"scene {scene.id!r}: frame: target {frame.target} is not the picture's (height, width) "
            f"{size}; make the shards again with prepare.py"
        )
    return replace(scene, frame=frame)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 in 0..255 to (3, H, W) float32 in [-1, 1]: 0 is -1 and 255 is 1, exactly."""
    planes = np.array(image.transpose(2, 0, 1), order="C")
    return torch.from_numpy(planes).float().div_(127.5).sub_(1)
