"""Features of pictures kept on disk, so that true pictures of a split go through a network once and not in every evaluation.

A feature is found by what made it and by the picture's own pixels, never by a name: a changed picture, network or resizing
is another feature. Any number of processes may write at once.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from files.atomic import replacing


class FeatureCache:
    """Features by picture.

    Args:
        folder: Where they are kept, an array a file; None keeps none.
        settings: All that decides a picture's feature, as JSON values.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = None if folder is None else Path(folder) / name

    def __call__(
        self, images: Sequence[np.ndarray], extract: Callable[[Sequence[np.ndarray]], np.ndarray]
    ) -> np.ndarray:
        """The features of pictures; those that are not kept yet are made, and kept.

        Args:
            images: B pictures (H, W, 3) uint8, of any sizes.
            extract: Gives the features (b, D) of b pictures; called once, with those that are missing.

        Returns:
            (B, D).
        """
        if self.folder is None:
            return extract(images)
        paths = [self._path(image) for image in images]
        missing = [place for place, path in enumerate(paths) if not path.is_file()]
        made = extract([images[place] for place in missing]) if missing else ()
        for place, feature in zip(missing, made, strict=True):
            self._write(paths[place], feature)
        fresh = dict(zip(missing, made, strict=True))
        return np.stack([fresh[i] if i in fresh else np.load(path, allow_pickle=False) for i, path in enumerate(paths)])

    def _path(self, image: np.ndarray) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npy"

    @staticmethod
    def _write(path: Path, feature: np.ndarray) -> None:
        with replacing(path, sync=False) as file:  # other processes may write the same
            np.save(file, feature)
