"""Diversity: how different two pictures of one scene are that were drawn from two seeds.

The distance is LPIPS with AlexNet, as in the rich-context paper's table of diversity. The network is torchmetrics', which
ships the weights learnt on judgements; AlexNet's own are torchvision's file.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from metrics.base import Metric, NotAvailable, Row, Value, bootstrap_interval, check_images
from metrics.inception import batches
from metrics.weights import file_hash, weights_file
from scenes.scene import Scene

ALEXNET = "alexnet-owt-7be5be79.pth"
SOURCE = f"https://download.pytorch.org/models/{ALEXNET}"
_SETTING = "metric.diversity.weights"
_SMALLEST = 63  # px; AlexNet leaves nothing of smaller pictures


class Diversity(Metric):
    """`diversity`: the mean LPIPS over scenes, 0 where both pictures are the same; here more is better.

    Pictures are compared at their own size, which the figure depends on.

    Args:
        weights: AlexNet's file; None for where torchvision keeps it.
        batch_size: Pairs that go through the network at once.
        resamples: Bootstrap resamples of the interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: A batch size below 1.

    Source:
        Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric.
    """

    name = "diversity"
    pairs = True

    def __init__(
        self, *, weights: str | Path | None = None, batch_size: int = 32, resamples: int = 1000, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is too few; give 1 or more")
        self.weights, self.batch_size, self.resamples, self.seed = weights, batch_size, resamples, seed
        self.network: Any = None
        self.device: Any = "cpu"

    def file(self) -> Path:
        """AlexNet's file.

        Returns:
            The file; it is there.

        Raises:
            NotAvailable: It is not.
        """
        import torch

        kept = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
        return weights_file(self.weights, kept, setting=_SETTING, source=SOURCE)

    def settings(self) -> dict[str, Any]:
        """The network by name and hash (None where it is not there), resamples, seed."""
        try:
            digest = file_hash(self.file())
        except NotAvailable:
            digest = None
        return {"network": "lpips alex", "sha256": digest, "resamples": self.resamples, "seed": self.seed}

    def to(self, device: Any) -> Self:
        """The metric with its network on a torch device, loaded where it was not yet.

        Args:
            device: Where it is to work.

        Returns:
            The metric.

        Raises:
            NotAvailable: AlexNet's weights are not there, or the file holds others.
        """
        if self.network is None:
            self.network = _lpips(self.file())
        self.network.to(device)
        self.device = device
        return self

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """The distance of B pairs.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: B pictures of the same Scenes from another seed, each of its partner's size.

        Returns:
            B rows: "scene" and "diversity"; "failure" where the pair's sizes differ or are too small for AlexNet.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        import torch

        check_images(images, scenes)
        check_images(again, scenes)
        network = self.to("cpu").network if self.network is None else self.network
        rows: list[Row] = [{"scene": scene.id} for scene in scenes]
        good = []
        for place, (one, other) in enumerate(zip(images, again, strict=True)):
            if one.shape != other.shape:
                rows[place]["failure"] = f"pictures of {one.shape[:2]} and {other.shape[:2]} px cannot be compared"
            elif min(one.shape[:2]) < _SMALLEST:
                rows[place]["failure"] = (
                    f"a picture of {one.shape[:2]} px is too small for AlexNet; {_SMALLEST} px are enough"
                )
            else:
                good.append(place)
        for group in batches([images[place] for place in good], self.batch_size, by_size=True):
            places = [good[i] for i in group]
            sides = (
                torch.from_numpy(np.stack([side[place] for place in places])).to(self.device).permute(0, 3, 1, 2)
                / 127.5
                - 1
                for side in (images, again)
            )
            with torch.inference_mode():
                distances = network(*sides).flatten().tolist()
            for place, distance in zip(places, distances, strict=True):
                rows[place]["diversity"] = distance
        return rows

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The mean distance over scenes.

        Args:
            rows: One for each scene.
            true: Not read.

        Returns:
            "diversity".
        """
        distances = (row.get("diversity") for row in rows)
        value = bootstrap_interval(distances, resamples=self.resamples, seed=self.seed)
        return {"diversity": replace(value, failed=sum("failure" in row for row in rows))}


def _lpips(path: Path) -> Any:
    """The network of torchmetrics with AlexNet's weights from a file in torchvision's form."""
    import torch
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        network = _NoTrainLpips(net="alex", pnet_rand=True)
        for convolutions in network.net.children():  # slices whose parts keep AlexNet's numbers
            convolutions.load_state_dict(
                {key: stored[f"features.{key}"] for key in convolutions.state_dict()}, strict=True
            )
    except (RuntimeError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotAvailable(
            f"{path}: not torchvision's AlexNet ({reason}); download it from {SOURCE} and name it by {_SETTING}=FILE"
        ) from error
    return network
