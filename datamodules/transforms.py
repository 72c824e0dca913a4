"""From a stored record to a training sample: size, mirroring, value range, caption; the Scene moves along.

Where an image is cut, whether it is mirrored, which caption it has and which latent is drawn from stored moments depends on
(seed, position) alone, so a resumed run sees what an unbroken one sees. Nothing here draws from a generator of the
process. Legend: H = W = resolution, (C, h, w) a latent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from datamodules.crops import CROPS, Window, center_window, random_resized_window, random_window
from datamodules.equal_texts import EQUAL_TEXTS, told_apart
from datamodules.order import choice, flips, latent_noise
from datamodules.padding import padded, padded_scene
from datamodules.shards import Record
from scenes.graph import related_by_boxes
from scenes.scene import Frame, Scene

CAPTIONS = ("first", "any")
RESIZES = ("crop", "squash", "pad")
RELATIONS = ("stored", "boxes")
POSTERIORS = ("sample", "mode")
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
FLIPPED_LATENT = (
    "the shards hold latents, which cannot be mirrored, and none of the mirrored pictures; set data.flip=false, or make latents "
    "of pictures with stage.output.flipped=true"
)
CUT_LATENT = "the shards hold latents, which cannot be cut anew; set data.crop=center, or give shards of images"


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
        min_visible: Objects go of whose box the crop leaves less than this share.
        caption: Where a source kept several captions: "first" takes the scene's own, "any" draws one.
        resize: How a picture becomes square: "crop" cuts a part out and scales it, "squash" scales both sides and keeps all
            of it, "pad" puts white beside or below it first.
        crop: Which part of samples with a position is cut out: the "center" square, a "random" square of the short side, or a
            "random_resized" window (`crops.py`). What has no position (held-out scenes, latents to be made) has the centre.
        crop_scale: Of "random_resized": least and largest share of the picture's area.
        crop_ratio: Of "random_resized": least and largest width over height, which scaling to the square evens out.
        interpolation: How pixels are scaled: "bilinear", "bicubic" or "lanczos", each smoothed where it scales down (Pillow's).
        relations: "stored" takes the scene's own, "boxes" those that the boxes left stand in.
        relations_per_object: Of "boxes": of each object those to its nearest so many others; None is all pairs.
        equal_texts: What becomes of descriptions that objects share once the crop has left them: "kept" as they are, or with the
            endings of `equal_texts.told_apart`.
        posterior: What becomes of stored moments: "sample" draws a latent anew at each position, "mode" takes the mean.

    Raises:
        ValueError: Another word for a choice, a share or range that is none, a crop of what is squashed, or a negative number of
            relations.
    """

    resolution: int
    flip: bool = False
    seed: int = 0
    min_area: float = 0.01
    min_visible: float = 0.0
    caption: str = "first"
    resize: str = "crop"
    crop: str = "center"
    crop_scale: Sequence[float] = (0.8, 1.1)
    crop_ratio: Sequence[float] = (0.95, 1.05)
    interpolation: str = "bilinear"
    relations: str = "stored"
    relations_per_object: int | None = None
    equal_texts: str = "kept"
    posterior: str = "mode"

    def __post_init__(self) -> None:
        """Refuse what no sample can be made with."""
        words = {
            "caption": CAPTIONS,
            "resize": RESIZES,
            "crop": CROPS,
            "interpolation": INTERPOLATIONS,
            "relations": RELATIONS,
            "posterior": POSTERIORS,
            "equal_texts": EQUAL_TEXTS,
        }
        for name, choices in words.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"data.{name}={value}: no such choice; take {' or '.join(choices)}")
        if self.crop != "center" and self.resize != "crop":
            raise ValueError(f"data.crop={self.crop}: data.resize={self.resize} cuts nothing out; set data.resize=crop")
        for name in ("crop_scale", "crop_ratio"):
            bounds = list(getattr(self, name))
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
                raise ValueError(f"data.{name}={bounds}: give the least and the largest, above 0, such as [0.8,1.1]")
        if not 0 <= self.min_visible <= 1:
            raise ValueError(f"data.min_visible={self.min_visible}: give a share of an object's box, from 0 to 1")
        if self.relations_per_object is not None and self.relations_per_object < 0:
            raise ValueError(f"data.relations_per_object={self.relations_per_object}: give 0 or more, or null for all")
        if not 0 <= self.min_area < 1:
            raise ValueError(f"data.min_area={self.min_area}: give a share of the picture, from 0 to below 1")

    def __call__(self, record: Record, position: int) -> Sample:
        """The sample at a position of the stream.

        Args:
            record: What is stored.
            position: Where it stands; it decides crop, mirroring and caption.

        Returns:
            The sample, a latent as float32.

        Raises:
            ValueError: The sample is to be mirrored, and the record is a latent that is not; or a latent is to be cut.
        """
        record = replace(record, scene=self._captioned(record.scene, position))
        if record.latent is not None:
            if self.crop != "center":
                raise ValueError(f"data.crop={self.crop}: {CUT_LATENT}")
            if self.mirrors(position) and not record.mirrored:
                raise ValueError(f"data.flip=true: {FLIPPED_LATENT}")
            scene, dropped = record.scene.without_small(self.min_area)
            scene = self._related(scene)
            latent = self._drawn(record.latent, record.log_variance, position)
            scene = scene.flip() if record.mirrored else scene
            return Sample(latent=latent, scene=scene, position=position, dropped=dropped)
        assert record.image is not None
        image, scene, dropped = self.square(record.image, record.scene, position)
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

    def square(
        self, image: np.ndarray | Image.Image, scene: Scene, position: int | None = None
    ) -> tuple[np.ndarray, Scene, int]:
        """Cut an image and scale it to `resolution`; one of that size of which all is kept stays as it is.

        Args:
            image: (height, width, 3) uint8, or the same as an RGB image.
            scene: The scene in the frame of that image.
            position: Of the sample in the stream of samples, which decides a random crop; None cuts the centre out.

        Returns:
            (resolution, resolution, 3) uint8, the scene moved along, and how many of its objects went.

        Raises:
            ValueError: The scene's frame is of another size than the image.
        """
        if self.resize == "pad":
            image, scene = padded(image, scene)
        size, square = _size(image), (self.resolution, self.resolution)
        window = self._window(size, position)
        if size == square and window == (0, 0, *size):
            return np.asarray(image), *scene.without_small(self.min_area)
        scene, dropped = self._cut(_framed(scene, size), window)
        top, left, height, width = window
        opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
        box = (left, top, left + width, top + height)
        return np.asarray(opened.resize(square, INTERPOLATIONS[self.interpolation], box=box)), scene, dropped

    def scene(self, scene: Scene) -> Scene:
        """What becomes of a scene alone: its square and its relations; never mirrored, under its own caption.

        Args:
            scene: The scene; without a frame its boxes are taken to be of a square.

        Returns:
            The scene in its new frame.
        """
        scene = padded_scene(scene) if self.resize == "pad" else scene
        size = None if scene.frame is None else scene.frame.target
        if size is None or size == (self.resolution, self.resolution):
            return self._related(scene.without_small(self.min_area)[0])
        return self._related(self._cut(scene, self._window(size))[0])

    def _window(self, size: tuple[int, int], position: int | None = None) -> Window:
        """The part of an image of (height, width) px that becomes the square."""
        if self.resize != "crop":
            return 0, 0, *size
        if self.crop == "center" or position is None:
            return center_window(size)
        if self.crop == "random":
            return random_window(size, seed=self.seed, position=position)
        return random_resized_window(
            size, scale=self.crop_scale, ratio=self.crop_ratio, seed=self.seed, position=position
        )

    def _cut(self, scene: Scene, window: Window) -> tuple[Scene, int]:
        """The scene of a window of its image that is scaled to the square, and how many of its objects went."""
        if scene.frame is not None and window == (0, 0, *scene.frame.target):
            scene, dropped = scene.without_small(self.min_area)
        else:
            scene, dropped = scene.crop(*window, min_area=self.min_area, min_visible=self.min_visible)
        assert scene.frame is not None
        return replace(scene, frame=replace(scene.frame, target=(self.resolution, self.resolution))), dropped

    def _related(self, scene: Scene) -> Scene:
        """The scene with the relations and the texts that are asked for."""
        if self.equal_texts != "kept":
            texts = told_apart([item.description for item in scene.objects], self.equal_texts)
            objects = [replace(item, description=text) for item, text in zip(scene.objects, texts, strict=True)]
            scene = replace(scene, objects=tuple(objects))
        if self.relations == "stored":
            return scene
        return related_by_boxes(scene, max_per_object=self.relations_per_object)


def _size(image: np.ndarray | Image.Image) -> tuple[int, int]:
    """(height, width) px."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


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
