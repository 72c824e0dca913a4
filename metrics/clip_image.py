"""CLIP image similarity: how near each picture is to the true picture of its scene.

It is what LAION-SG reports as "CLIP score" (.698 for SDXL-SG on CompSGen Bench, with ViT-B/32): no text takes part. The
agreement with captions is another metric: `metrics.clip_score`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from metrics.base import Metric, Row, Value, bootstrap_interval, check_images
from metrics.clip import Clip
from metrics.feature_cache import FeatureCache
from scenes.scene import Scene


class ClipImage(Metric):
    """`clip_image`: the mean cosine of the embeddings of a picture and of the scene's true one, in [-1, 1].

    Args:
        model: CLIP by hub name or local folder.
        revision: Of the hub's repository.
        batch_size: Pictures that go through the model at once.
        cache: Folder where embeddings are kept; None keeps none.
        resamples: Bootstrap resamples of the interval.
        seed: Seed of the resampling.

    Source:
        Li et al. 2024, LAION-SG (arXiv 2412.08580), table 3, and test/caculate_clip_score.py beside it.
    """

    name = "clip_image"
    compares = True

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-base-patch32",
        revision: str | None = None,
        batch_size: int = 32,
        cache: str | Path | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.clip = Clip(model, setting="metric.clip_image.model", revision=revision, batch_size=batch_size)
        self.cache, self.resamples, self.seed = cache, resamples, seed

    def settings(self) -> dict[str, Any]:
        """The model by name and revision or hash, resamples, seed."""
        return {**self.clip.settings(), "resamples": self.resamples, "seed": self.seed}

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

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """The embeddings of B pictures.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows: "scene" and "embedding", (D,) float32 of length 1.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        found = FeatureCache(self.cache, self.clip.settings())(images, self.clip.pictures)
        return [{"scene": scene.id, "embedding": row} for scene, row in zip(scenes, found, strict=True)]

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The mean cosine over scenes.

        Args:
            rows: One for each scene.
            true: The rows of the true pictures in the same order.

        Returns:
            "clip_image".

        Raises:
            ValueError: The true rows are of other scenes.
        """
        if [row["scene"] for row in rows] != [row["scene"] for row in true]:
            raise ValueError(
                f"true: {len(true)} rows of true pictures for {len(rows)} rows, or of other scenes; give those of the same "
                "scenes in the same order"
            )
        cosines = [
            float(np.dot(row["embedding"], other["embedding"])) if "embedding" in row and "embedding" in other else None
            for row, other in zip(rows, true, strict=True)
        ]
        value = bootstrap_interval(cosines, resamples=self.resamples, seed=self.seed)
        return {"clip_image": replace(value, failed=sum("failure" in row for row in rows))}
