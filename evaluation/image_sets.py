"""Sets of pictures to score, one for each scene, by the scene's place: generated ones, those of a folder, another's in turn.

A set reads one picture at a time and tells without reading it what the picture is, so that rows that are on disk are known to
be of it. True pictures are read where the split is (`sampling/scene_split.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from sampling.manifest import Manifest, picture_name

ENDINGS = (".png", ".jpg", ".jpeg")
Fit = Callable[[int, np.ndarray], np.ndarray]  # of a place and its picture (H, W, 3), what of it is measured


class PictureSet(Protocol):
    """Pictures of the scenes of a split, by place."""

    def stamp(self, place: int) -> str | None:
        """What tells the picture of a place from every other; None where there is none yet."""
        ...

    def read(self, place: int) -> np.ndarray:
        """The picture of a place, (H, W, 3) uint8 RGB."""
        ...


@dataclass(frozen=True)
class Generated:
    """The pictures of a manifest.

    Attributes:
        manifest: Where they are.
        ids: The scenes' ids by place.
        fit: What of a picture is measured; None is all of it.
    """

    manifest: Manifest
    ids: Sequence[str]
    fit: Fit | None = None

    def stamp(self, place: int) -> str | None:
        """The hash of the file as it was written."""
        return self.manifest.recorded(self.ids[place])

    def read(self, place: int) -> np.ndarray:
        """What is measured of the picture, verified."""
        picture = np.asarray(self.manifest.read(self.ids[place]))
        return picture if self.fit is None else self.fit(place, picture)


class Folder:
    """Pictures that something else made: `<scene id>.png`, or .jpg or .jpeg.

    Args:
        folder: Where they lie; .png is taken before .jpg and .jpeg.
        ids: The scenes' ids by place.
        fit: What of a picture is measured; None is all of it.
        how: What else that depends on, which marks the rows of the pictures.

    Raises:
        ValueError: A scene has no picture there; scoring only those that exist would change the protocol.
    """

    def __init__(self, folder: str | Path, ids: Sequence[str], *, fit: Fit | None = None, how: str = "") -> None:
        found = [_picture(Path(folder), name) for name in ids]
        missing = [name for name, path in zip(ids, found, strict=True) if path is None]
        if missing:
            raise ValueError(
                f"images={folder}: {len(missing)} of {len(ids)} scenes have no picture, first {missing[0]}.png; "
                "give one picture for each scene, named by the scene's id"
            )
        self.paths = [path for path in found if path is not None]
        self.fit, self.how = fit, how

    def stamp(self, place: int) -> str | None:
        """Name, size and time of the file."""
        status = self.paths[place].stat()
        return f"{self.paths[place].name}:{status.st_size}:{status.st_mtime_ns}{self.how}"

    def read(self, place: int) -> np.ndarray:
        """What is measured of the picture."""
        with Image.open(self.paths[place]) as opened:
            picture = np.asarray(opened.convert("RGB"))
        return picture if self.fit is None else self.fit(place, picture)


@dataclass(frozen=True)
class Turned:
    """The picture of the next scene for each scene: what a model scores that ignores what it is asked for.

    Attributes:
        pictures: The set.
        count: How many scenes there are.
    """

    pictures: PictureSet
    count: int

    def stamp(self, place: int) -> str | None:
        """That of the next picture."""
        return self.pictures.stamp((place + 1) % self.count)

    def read(self, place: int) -> np.ndarray:
        """The next picture."""
        return self.pictures.read((place + 1) % self.count)


def _picture(folder: Path, scene_id: str) -> Path | None:
    names = dict.fromkeys((picture_name(scene_id), scene_id))  # as written here, and as others may have
    found = (folder / f"{name}{ending}" for name in names for ending in ENDINGS)
    return next((path for path in found if path.is_file()), None)
