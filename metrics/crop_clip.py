"""CropCLIP: how well the part of a picture in each box agrees with the text of its object.

The same with PickScore's model is in `crop_pick_score.py`; whole pictures with captions are in `clip_score.py`.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from metrics.base import Metric, Row, Value, check_images
from metrics.clip import Clip
from metrics.intervals import mean_over_objects
from metrics.object_values import SIDES, areas, check_sides, object_values, pixel_boxes
from scenes.scene import Scene


class CropClip(Metric):
    """CLIP's logit (its scale, about 100, times the cosine) of each box's part of the picture with its object's text.

    The text is the object's description, its phrase where there is none, cut to the model's length. Boxes are cut to whole
    pixels; one without a pixel does not count. "crop_clip" is the published figure, the mean over scenes of the mean over
    objects; "crop_clip_objects" counts every object alike, and "crop_clip_small", "_medium", "_large" those of a size;
    "crop_clip_cut" is the share of texts that were cut.

    Args:
        model: CLIP by hub name or local folder.
        revision: Of the hub's repository.
        processor: Hub name or local folder of tokenizer and preprocessing, where they do not lie with the model.
        sides: Between small and medium, medium and large objects: px of a picture whose longer side is 512.
        batch_size: Parts of pictures that go through the model at once.
        resamples: Bootstrap resamples of an interval, over scenes.
        seed: Seed of the resampling.

    Raises:
        ValueError: The sides are not two rising numbers.

    Source:
        Cheng et al. 2024, Rethinking The Training And Evaluation of Rich-Context Layout-to-Image Generation, section 4, and its
        published evaluation (`evaluation.py`): CLIP ViT-B/32.
    """

    name: ClassVar[str] = "crop_clip"
    requires = frozenset({"boxes", "phrases"})

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-base-patch32",
        revision: str | None = None,
        processor: str | None = None,
        sides: Sequence[float] = SIDES,
        batch_size: int = 32,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        where = f"metric.{self.name}"
        self.sides = check_sides(sides, where=where)
        self.clip = Clip(model, setting=f"{where}.model", revision=revision, batch_size=batch_size, processor=processor)
        self.resamples, self.seed = resamples, seed

    def settings(self) -> dict[str, Any]:
        """The model by name and revision or hash, sizes, resamples, seed."""
        return {
            **self.clip.settings(),
            "processor": self.clip.processor_name,
            "sides": list(self.sides),
            "resamples": self.resamples,
            "seed": self.seed,
        }

    def to(self, device: Any) -> Self:
        """The metric with its model on a torch device; see `Metric.to`."""
        self.clip.to(device)
        return self

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """The score of each object.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows with a number for each of the G objects that have a box: "values", NaN where the box holds no pixel;
            "areas", as in `object_values.areas`; "cut", 1 where the text was too long and 0 else.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        length = self.clip.longest - 2
        crops, texts, rows = [], [], []
        for image, scene in zip(images, scenes, strict=True):
            parts = crops_of(image, pixel_boxes(scene, image.shape[:2]))
            words = [item.description or item.phrase for item in scene.objects if item.box is not None]
            tokens = [self.clip.tokens(text) for text in words]
            values = np.array([math.nan if part is None else 0.0 for part in parts], np.float32)
            cut = np.array([float(len(text) > length) for text in tokens], np.float32)
            crops += [part for part in parts if part is not None]
            texts += [text[:length] for text, part in zip(tokens, parts, strict=True) if part is not None]
            rows.append({"scene": scene.id, "values": values, "areas": areas(scene), "cut": cut})
        scores = self._scores(crops, texts)
        begin = 0
        for row in rows:
            counts = np.flatnonzero(~np.isnan(row["values"]))
            row["values"][counts] = scores[begin : begin + len(counts)]
            begin += len(counts)
        return rows

    def _scores(self, crops: Sequence[np.ndarray], tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """The logits (N,) of N parts of pictures with N texts; a text that comes again is encoded once."""
        if not crops:
            return np.zeros(0, np.float32)
        places = {text: place for place, text in enumerate(dict.fromkeys(map(tuple, tokens)))}
        texts = self.clip.texts(list(places))[[places[tuple(text)] for text in tokens]]
        return (self.clip.pictures(crops) * texts).sum(axis=1) * self.clip.model.logit_scale.exp().item()

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The values over all scenes; see the class.

        Args:
            rows: One for each scene, in the order of the scenes.
            true: Not read.

        Returns:
            Values by name.
        """
        values = object_values(self.name, rows, sides=self.sides, resamples=self.resamples, seed=self.seed)
        scored = [row for row in rows if "failure" not in row]
        cut = mean_over_objects(scored, [row["cut"] for row in scored], resamples=self.resamples, seed=self.seed)
        return {**values, f"{self.name}_cut": cut}


def crops_of(image: np.ndarray, boxes: np.ndarray) -> list[np.ndarray | None]:
    """The parts of a picture (H, W, 3) in boxes (N, 4) of whole px, None where a box holds no pixel."""
    return [
        image[top:bottom, left:right] if top < bottom and left < right else None
        for left, top, right, bottom in boxes.tolist()
    ]
