"""FID and KID: how far the features of all generated pictures are from those of the true ones.

Here live the metric, which names the form of the network in its values, and reference statistics kept in a file. The network
is `metrics.inception`, the arithmetic `metrics.distances`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from metrics.base import Metric, NotAvailable, Row, Value, check_images
from metrics.distances import KERNEL_SIZE, Gaussian, frechet, half_width, kernel, quick_frechet, square_root
from metrics.feature_cache import FeatureCache
from metrics.inception import Inception
from metrics.weights import file_hash
from scenes.scene import Scene

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of true pictures.

    Attributes:
        mode: The form of the network that the features are of.
        weights: SHA-256 of its weights, "" where it was not known.
        split: What pictures these are.
        count: How many.
        gaussian: Mean and covariance.
        features: (count, D) float32; None where only FID is wanted.
    """

    mode: str
    weights: str
    split: str
    count: int
    gaussian: Gaussian
    features: np.ndarray | None = None

    def save(self, path: str | Path) -> None:
        """Writes an `.npz` file: mu, sigma, mode, weights, split, count, and features where there are any."""
        arrays = {
            "mu": self.gaussian.mu,
            "sigma": self.gaussian.sigma,
            **{name: np.array(getattr(self, name)) for name in ("mode", "weights", "split", "count")},
        }
        if self.features is not None:
            arrays["features"] = self.features
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:  # given a name, numpy would append .npz
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads such a file.

        Args:
            path: The file.

        Returns:
            The statistics.

        Raises:
            NotAvailable: It is not there.
            ValueError: It lacks an entry.
        """
        if not Path(path).is_file():
            raise NotAvailable(
                f"reference: {path}: no such file; evaluate.py references=DIR writes one, null compares with "
                "the true pictures"
            )
        with np.load(path, allow_pickle=False) as stored:
            lacking = {"mu", "sigma", "mode", "weights", "split", "count"}.difference(stored.files)
            if lacking:
                raise ValueError(
                    f"reference: {path} holds no {', '.join(sorted(lacking))}; write it by evaluate.py references=DIR, which says"
                    " what network and pictures its statistics are of"
                )
            return cls(
                mode=str(stored["mode"]),
                weights=str(stored["weights"]),
                split=str(stored["split"]),
                count=int(stored["count"]),
                gaussian=Gaussian(mu=stored["mu"], sigma=stored["sigma"]),
                features=stored["features"] if "features" in stored.files else None,
            )


class FID(Metric):
    """FID and KID, `fid_<mode>` and `kid_<mode>`: figures of different modes are different figures.

    Both are of the whole set, so their intervals are not means' ones: see `metrics.distances.half_width`. FID falls as the
    number of pictures grows (Chong and Forsyth 2020); compare figures of equal numbers. KID does not, and it is given only
    where single features of the reference are at hand.

    Args:
        mode: The form of the network and its resizing, see `metrics.inception.Inception`.
        weights: The network's file; None for where clean-fid or pytorch-fid keep it.
        reference: A file of `save_reference` to compare with; None for the true pictures of the same scenes.
        pictures: How many pictures the figure is to be of, the first in the order of the scenes; None for all.
        subsets: Random halves that an interval is made of.
        batch_size: Pictures that go through the network at once.
        cache: Folder where features are kept; None keeps none.
        seed: Of the halves and of KID's subsets.

    Raises:
        ValueError: An unknown mode, or numbers that make no figure.
    """

    name = "fid"
    compares = True
    references = True

    def __init__(
        self,
        *,
        mode: str = "clean",
        weights: str | Path | None = None,
        reference: str | Path | None = None,
        pictures: int | None = None,
        subsets: int = 20,
        batch_size: int = 32,
        cache: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if subsets < 2:
            raise ValueError(f"subsets: {subsets} have no spread; give 2 or more (20 is customary)")
        if pictures is not None and pictures < 4:
            raise ValueError(f"pictures: {pictures} have no halves; give 4 or more, or null for all")
        setting = f"metric.{'fid_laion_sg' if mode == 'laion_sg' else 'fid'}"
        self.inception = Inception(mode, weights=weights, batch_size=batch_size, setting=f"{setting}.weights")
        self.setting, self.reference, self.pictures = setting, reference, pictures
        self.subsets, self.cache, self.seed = subsets, cache, seed
        self._stored: Reference | None = None

    def settings(self) -> dict[str, Any]:
        """Mode, weights and reference by name and hash, numbers of pictures and subsets, seed."""
        file = None if self.reference is None else Path(self.reference)
        return {
            **self.inception.settings(),
            "reference": file and file.name,
            "reference_sha256": file_hash(file) if file and file.is_file() else None,
            "pictures": self.pictures,
            "subsets": self.subsets,
            "seed": self.seed,
        }

    def to(self, device: Any) -> Self:
        """The metric with its network on a torch device and its reference read.

        Args:
            device: Where it is to work.

        Returns:
            The metric.

        Raises:
            NotAvailable: Weights or reference are not there.
            ValueError: The reference is of another mode or other weights.
        """
        self.inception.to(device)
        self._given()
        return self

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """The features of B pictures.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows: "scene" and "features", (2048,) float32.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        features = FeatureCache(self.cache, self.inception.settings())(images, self.inception.features)
        return [{"scene": scene.id, "features": row} for scene, row in zip(scenes, features, strict=True)]

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """FID and KID of all pictures.

        Args:
            rows: One for each scene.
            true: The rows of the true pictures in the same order; not read where there is a reference.

        Returns:
            "fid_<mode>" and, where the reference has features, "kid_<mode>".

        Raises:
            ValueError: Fewer pictures than asked for, true rows of other scenes, or a reference of another network.
        """
        reference = self._given()
        places = _usable(rows, None if reference else true)[: self.pictures]
        if self.pictures is not None and len(places) < self.pictures:
            raise ValueError(
                f"{self.setting}.pictures: {self.pictures} asked for, but there are features of {len(places)}; "
                "generate more, or lower it (null takes what there is)"
            )
        failed = sum("failure" in row for row in rows)
        names = [f"{figure}_{self.inception.form}" for figure in ("fid", "kid")]
        if len(places) < 4:
            log.warning("%s: %d pictures make no figure; 4 are the fewest", self.setting, len(places))
            return {name: Value(mean=math.nan, low=math.nan, high=math.nan, count=0, failed=failed) for name in names}
        places.sort(key=lambda place: rows[place]["scene"])  # so that the order of the rows does not matter
        mine = _stacked(rows, places)
        fid, kid = self._against(mine, reference) if reference else self._paired(mine, _stacked(true, places))
        values = {names[0]: fid} if kid is None else dict(zip(names, (fid, kid), strict=True))
        floors = {names[0]: 0.0, names[1]: -math.inf}  # KID, being unbiased, may be below 0
        return {
            name: Value(
                mean=mean,
                low=min(mean, max(floors[name], mean - half)),
                high=mean + half,
                count=len(places),
                failed=failed,
            )
            for name, (mean, half) in values.items()
        }

    def save_reference(self, path: str | Path, rows: Sequence[Row], *, split: str, features: bool = True) -> None:
        """Keeps the statistics of true pictures for later evaluations.

        Args:
            path: An `.npz` file.
            rows: The rows of the true pictures, at least 2.
            split: What pictures these are, such as "coco val2017".
            features: Whether to keep single features too, 8 kB a picture; KID needs them.

        Raises:
            ValueError: Fewer than 2 rows with features.
        """
        places = _usable(rows, None)
        if len(places) < 2:
            raise ValueError(f"rows: {len(places)} with features; 2 are the fewest that have a covariance")
        stacked = _stacked(rows, places)
        Reference(
            mode=self.inception.form,
            weights=self.inception.settings()["sha256"] or "",
            split=split,
            count=len(places),
            gaussian=Gaussian.of(stacked),
            features=stacked if features else None,
        ).save(path)

    def _given(self) -> Reference | None:
        """The reference of the settings, checked once to be of this network."""
        if self.reference is not None and self._stored is None:
            stored, wanted = Reference.load(self.reference), self.inception.settings()
            if stored.mode != wanted["mode"]:
                raise ValueError(
                    f"{self.setting}.reference: {self.reference} is of mode {stored.mode}, asked for is {wanted['mode']}; "
                    f"set {self.setting}.mode={stored.mode}, or give a reference of this mode"
                )
            if stored.weights and wanted["sha256"] and stored.weights != wanted["sha256"]:
                raise ValueError(
                    f"{self.setting}.reference: {self.reference} is of weights {stored.weights[:12]}, these are "
                    f"{wanted['sha256'][:12]}; take the same weights, or write the reference anew"
                )
            self._stored = stored
        return self._stored

    def _paired(self, mine: np.ndarray, theirs: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
        """Both figures with half their intervals, against as many true pictures; a subset is of scenes, on both sides."""
        self._warn(len(mine), mine.shape[1])
        count, draw = len(mine), {"subsets": self.subsets, "seed": self.seed}
        return (
            (
                frechet(mine, Gaussian.of(theirs), others=count),
                half_width(lambda half: quick_frechet(mine[half], Gaussian.of(theirs[half])), count, **draw),
            ),
            (
                kernel(mine, theirs, seed=self.seed),
                half_width(
                    lambda half: kernel(mine[half], theirs[half], seed=self.seed, subsets=1),
                    count,
                    most=KERNEL_SIZE,
                    **draw,
                ),
            ),
        )

    def _against(
        self, mine: np.ndarray, reference: Reference
    ) -> tuple[tuple[float, float], tuple[float, float] | None]:
        """Both figures with half their intervals, against a reference that does not vary."""
        width = len(reference.gaussian.mu)
        if mine.shape[1] != width:
            raise ValueError(
                f"{self.setting}.reference: {self.reference} has features of {width} numbers, these have {mine.shape[1]}; "
                "give a reference of the same network"
            )
        self._warn(min(len(mine), reference.count), width)
        count, draw = len(mine), {"subsets": self.subsets, "seed": self.seed}
        root = square_root(reference.gaussian.sigma) if count // 2 > width else None
        fid = (
            frechet(mine, reference.gaussian, others=reference.count),
            half_width(lambda half: quick_frechet(mine[half], reference.gaussian, root), count, **draw),
        )
        theirs = reference.features
        if theirs is None:
            return fid, None
        return fid, (
            kernel(mine, theirs, seed=self.seed),
            half_width(
                lambda half: kernel(mine[half], theirs, seed=self.seed, subsets=1), count, most=KERNEL_SIZE, **draw
            ),
        )

    def _warn(self, pictures: int, width: int) -> None:
        if pictures <= width:
            log.warning(
                "%s: of %d pictures, fewer than the %d whose covariance has full rank; the figure is far above that of a "
                "large set and compares only with one of as many pictures",
                self.setting,
                pictures,
                width + 1,
            )


def _usable(rows: Sequence[Row], true: Sequence[Row] | None) -> list[int]:
    """Places of the rows that have features, and whose true row does."""
    if true is None:
        return [place for place, row in enumerate(rows) if "features" in row]
    if [row["scene"] for row in rows] != [row["scene"] for row in true]:
        raise ValueError(
            f"true: {len(true)} rows of true pictures for {len(rows)} rows, or of other scenes; give those of the same scenes "
            "in the same order, or a reference"
        )
    return [place for place, row in enumerate(rows) if "features" in row and "features" in true[place]]


def _stacked(rows: Sequence[Row], places: Sequence[int]) -> np.ndarray:
    """The features (N, D) of the rows at N places."""
    return np.stack([np.asarray(rows[place]["features"]) for place in places])
