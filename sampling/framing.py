"""How pictures come into the frame of the scene that they are measured with.

A picture is drawn square. Where the protocol has put white beside the real pictures to make them so (`resize: pad`), it is
cut off again before anything is measured. Pictures that something else made are told by their own size: square, as the protocol
draws, or of the proportions of the whole picture. Which scenes there are is decided in `scene_split.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datamodules.padding import content
from datamodules.transforms import SceneTransform
from scenes import Scene

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Framing:
    """The frames of a split.

    Attributes:
        transform: How its pictures become square; None leaves them as they are stored.
        sizes: (height, width) of the stored pictures by place; None where a scene has no frame.
        ids: The scenes' ids by place.
    """

    transform: SceneTransform | None
    sizes: Sequence[Size | None]
    ids: Sequence[str]

    def measured(self, place: int, scene: Scene) -> Scene:
        """The scene that the picture of a drawn scene is measured with.

        Args:
            place: Of the scene.
            scene: As it is drawn.

        Returns:
            The same, without the padding.
        """
        size = self.sizes[place]
        if not self._pads or size is None or scene.frame is None or size[0] == size[1]:
            return scene
        return scene.crop(0, 0, *content(size, scene.frame.target[0]), min_area=0.0)[0]

    def cut(self, place: int, picture: np.ndarray) -> np.ndarray:
        """A square picture (H, H, 3) as it was drawn, without its padding."""
        size = self.sizes[place]
        if not self._pads or size is None:
            return picture
        rows, columns = content(size, picture.shape[0])
        return picture[:rows, :columns]

    def fitting(self, images_are: str) -> Callable[[int, np.ndarray], np.ndarray]:
        """What brings a picture that something else made into its scene's frame.

        Args:
            images_are: "square": as the protocol draws; "whole": the whole stored picture, in whatever size; "auto":
                square ones are the first, those of the stored picture's proportions the second.

        Returns:
            Called with place and picture (H, W, 3); a picture that is neither is refused.
        """

        def fit(place: int, picture: np.ndarray) -> np.ndarray:
            size = self.sizes[place]
            if size is None or (self.transform is None and images_are == "whole"):
                return picture
            if images_are == "square" or (images_are == "auto" and self._is_square(picture)):
                return self.cut(place, picture)
            if images_are == "auto" and not _alike(picture.shape[:2], size):
                self._refuse(place, picture, size)
            return self._whole(picture, size)

        return fit

    @property
    def _pads(self) -> bool:
        return self.transform is not None and self.transform.resize == "pad"

    def _is_square(self, picture: np.ndarray) -> bool:
        return self.transform is not None and picture.shape[0] == picture.shape[1]

    def _whole(self, picture: np.ndarray, size: Size) -> np.ndarray:
        """A picture of all that the stored one shows, as the stored one is measured."""
        if self.transform is None or self._pads:
            return picture
        if not _alike(picture.shape[:2], size):
            picture = np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        return self.transform.square(picture, Scene(id="picture"))[0]

    def _refuse(self, place: int, picture: np.ndarray, size: Size) -> None:
        height, width = picture.shape[:2]
        asked = "neither square nor" if self.transform is not None else "not"
        way = "images_are=whole" if self.transform is not None else "protocol.size=N for squares, or images_are=whole"
        raise ValueError(
            f"images: the picture of {self.ids[place]} has {height} x {width} px, {asked} of the proportions of its scene's, "
            f"{size[0]} x {size[1]}; say what it shows with {way}"
        )


def _alike(one: Sequence[int], other: Size) -> bool:
    """Whether two sizes have the same proportions, to a pixel of the first."""
    height, width = one
    return abs(height - width * other[0] / other[1]) <= 1 or abs(width - height * other[1] / other[0]) <= 1
