"""CLIP score: how well each picture agrees with its caption.

The figure is the mean over scenes of max(100 cos, 0), torchmetrics' scale; Hessel et al. write 2.5 max(cos, 0). Picture with
picture, which LAION-SG calls its CLIP score, is another metric: `metrics.clip_image`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from metrics.base import Row, SceneMetric, check_images
from metrics.clip import Clip
from scenes.scene import Scene

LONG = ("cut", "windows", "left_out")


class ClipScore(SceneMetric):
    """`clip_score`, and `clip_score_long_captions`: the share of captions with more tokens than CLIP reads.

    Args:
        model: CLIP by hub name or local folder. One that reads longer texts is used to its own length.
        revision: Of the hub's repository.
        long_captions: What is done with a caption that is too long: "cut" after 75 tokens as published protocols do, "windows"
            (the mean of the embeddings of consecutive windows of 75 tokens), or "left_out" (the scene does not count).
        batch_size: Pictures that go through the model at once.
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: An unknown way with long captions.

    Source:
        Hessel et al. 2021, CLIPScore: A Reference-free Evaluation Metric for Image Captioning.
    """

    name = "clip_score"
    requires = frozenset({"caption"})
    columns = ("clip_score", "clip_score_long_captions")

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        long_captions: str = "cut",
        batch_size: int = 32,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(resamples=resamples, seed=seed)
        if long_captions not in LONG:
            raise ValueError(
                f"metric.clip_score.long_captions: {long_captions} is unknown; choose one of {', '.join(LONG)}"
            )
        self.clip = Clip(model, setting="metric.clip_score.model", revision=revision, batch_size=batch_size)
        self.long_captions = long_captions

    def settings(self) -> dict[str, Any]:
        """The model by name and revision or hash, what is done with long captions, resamples, seed."""
        return {
            **self.clip.settings(),
            "long_captions": self.long_captions,
            "resamples": self.resamples,
            "seed": self.seed,
        }

    def to(self, device: Any) -> Self:
        """The metric with its model on a torch device.

        Args:
            device: Where it is to work.

        Returns:
            The metric.

        Raises:
            NotAvailable: The model is not there.
        """
        self.clip.to(device)
        return self

    def score(self, image: np.ndarray, scene: Scene) -> Mapping[str, float | None]:
        """The columns for one picture, (H, W, 3) uint8 RGB."""
        row = self.measure([image], [scene])[0]
        return {column: row[column] for column in self.columns}

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """Scores B pictures.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes; one without a caption does not count.
            again: Not read.

        Returns:
            B rows: "scene", "clip_score" in [0, 100], and "clip_score_long_captions", 1 for a caption that was too long.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        pictures = self.clip.pictures(images)
        length = self.clip.longest - 2
        tokens = [self.clip.tokens(scene.caption) if scene.caption else [] for scene in scenes]
        windows = [[text[at : at + length] for at in range(0, len(text), length)] for text in tokens]
        if self.long_captions != "windows":
            windows = [parts[:1] for parts in windows]
        embedded = iter(self.clip.texts([part for parts in windows for part in parts]))
        rows = []
        for scene, picture, text, parts in zip(scenes, pictures, tokens, windows, strict=True):
            whole = sum((next(embedded) for _ in parts), np.zeros_like(picture))
            is_long = len(text) > length
            counts = bool(text) and not (is_long and self.long_captions == "left_out")
            cosine = float(picture @ whole / np.linalg.norm(whole)) if counts else 0.0
            rows.append(
                {
                    "scene": scene.id,
                    "clip_score": max(100 * cosine, 0.0) if counts else None,
                    "clip_score_long_captions": float(is_long) if text else None,
                }
            )
        return rows
