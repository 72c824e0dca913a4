"""The scenes of a split, made square as a run's data made them, and their true pictures, read one at a time.

A split is a folder of shards, or files of scenes without pictures. Which of them, and what becomes of them, is the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from datamodules.shards import ShardSet, has_shards
from datamodules.transforms import SceneTransform
from runtime.launch.ranks import Ranks
from sampling.framing import Framing
from scenes import Scene
from scenes.forms import read_scenes

_OF_SOURCE = "equal_texts"  # of a transform: what belongs to the data of a protocol, not to that of the run
# of a transform: what is training's, or the images' size
_OF_SAMPLES = ("flip", "seed", "caption", "crop", "crop_scale", "crop_ratio", "resolution")
_SCENE_FILES = (".json", ".txt")
_WAIT = 1800.0  # seconds for another rank to make shards


@dataclass(frozen=True)
class TruePictures:
    """The true pictures of a split, by place.

    Attributes:
        shards: Where they are.
        transform: How they become square; None leaves them as they are stored.
        framing: What of the square is measured.
    """

    shards: ShardSet
    transform: SceneTransform | None
    framing: Framing

    def stamp(self, place: int) -> str | None:
        """The sample's, and how it becomes square."""
        how = self.transform
        made = None if how is None else [how.resolution, how.resize, how.interpolation]
        return f"{self.shards.stamp(place)}:{made}"

    def read(self, place: int) -> np.ndarray:
        """The picture, (H, W, 3) uint8 RGB."""
        record = self.shards[place]
        assert record.image is not None
        if self.transform is None:
            return record.image
        return self.framing.cut(place, self.transform.square(record.image, record.scene)[0])


@dataclass(frozen=True, kw_only=True)
class SceneSplit:
    """Scenes to draw or to score.

    Attributes:
        name: The folder or file.
        scenes: In their order, as pictures are measured with them.
        drawn: The same, square, as pictures are drawn for them.
        framing: How pictures come from the one to the other.
        provides: What they carry, in the words of `datamodules.sources.base.PROVIDABLE`.
        true: Their true pictures; None where there are none.
        whole: How many scenes the split has, of which `scenes` are the first.
    """

    name: str
    scenes: list[Scene]
    drawn: list[Scene]
    framing: Framing
    provides: frozenset[str]
    true: TruePictures | None
    whole: int


def square_transform(
    data: Mapping[str, Any] | DictConfig, resolution: int | None, given: Mapping[str, Any] | None = None
) -> SceneTransform | None:
    """How the data of a run made scenes and pictures square, and related scenes.

    Args:
        data: The run's.
        resolution: Height and width of the pictures, px; None: nothing becomes square.
        given: What lies over the run's.

    Returns:
        The transform, which mirrors nothing and draws no caption.
    """
    if resolution is None:
        return None
    names = {field.name for field in fields(SceneTransform)} - set(_OF_SAMPLES)
    settings = {name: data[name] for name in names - {_OF_SOURCE} if name in data} | dict(given or {})
    if unknown := sorted(set(settings) - names):
        raise ValueError(f"protocol.transform.{unknown[0]}: no such setting (have: {', '.join(sorted(names))})")
    return SceneTransform(resolution=resolution, **settings)


def split_of_shards(folder: str | Path, transform: SceneTransform | None, *, count: int | None = None) -> SceneSplit:
    """The split of a folder of shards.

    Args:
        folder: The shards, with pictures.
        transform: What becomes of scenes and pictures.
        count: How many to take from the start; None takes all.

    Returns:
        The split.

    Raises:
        ValueError: The shards hold latents, or fewer scenes than are asked for.
    """
    shards = ShardSet(folder)
    if shards.latents is not None:
        raise ValueError(
            f"protocol.shards: {folder} holds latents, and pictures are scored against pictures; "
            "prepare the same scenes with their pictures"
        )
    whole = len(shards)
    count = whole if count is None else count
    if whole < count:
        raise ValueError(f"protocol.scenes: {count} but {folder} holds {whole}; lower it or give more shards")
    stored = [shards.scene(number) for number in range(count)]
    provides = shards.provides
    if transform is not None and transform.relations == "boxes" and "boxes" in provides:
        provides = provides | {"relations"}
    drawn, framing = _framed(stored, transform)
    return SceneSplit(
        name=str(folder),
        scenes=_measured(drawn, framing),
        drawn=drawn,
        framing=framing,
        provides=provides,
        true=TruePictures(shards, transform, framing),
        whole=whole,
    )


def split_of_files(path: str | Path, transform: SceneTransform | None, *, count: int | None = None) -> SceneSplit:
    """The split of a file of scenes, or of all files of scenes in a folder by name; there are no true pictures.

    Args:
        path: A file in one of the forms of `scenes.forms`, or a folder of .json and .txt files.
        transform: What becomes of the scenes.
        count: How many to take from the start; None, or more than there are, takes all.

    Returns:
        The split.

    Raises:
        ValueError: There is no scene, or a file is none of the forms.
    """
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.suffix in _SCENE_FILES) if path.is_dir() else [path]
    stored = [scene for file in files for scene in read_scenes(file)]
    if not stored:
        raise ValueError(f"scenes={path}: no files of scenes there; give .json or .txt files of scenes")
    drawn, framing = _framed(stored[:count], transform)
    return SceneSplit(
        name=str(path),
        scenes=_measured(drawn, framing),
        drawn=drawn,
        framing=framing,
        provides=_carried([*drawn, *(_squared(scene, transform) for scene in stored[len(drawn) :])]),
        true=None,
        whole=len(stored),
    )


def made_shards(node: Mapping[str, Any], ranks: Ranks) -> None:
    """Writes a protocol's shards where it says how and there are none: rank 0 does, the others wait for them.

    Args:
        node: The protocol: `shards`, the folder, and `make`, called with it as `out`.
        ranks: Which process this is.

    Raises:
        ValueError: Another rank has not made them in half an hour.
    """
    if node.get("make") is None or has_shards(node["shards"]):
        return
    if ranks.rank == 0:
        node["make"](out=node["shards"])
        return
    end = time.monotonic() + _WAIT
    while not has_shards(node["shards"]):
        if time.monotonic() > end:
            raise ValueError(f"protocol.shards: rank 0 has not made {node['shards']}; look at what it says")
        time.sleep(0.2)


def _framed(stored: list[Scene], transform: SceneTransform | None) -> tuple[list[Scene], Framing]:
    """Stored scenes as they are drawn, and how their pictures come into the frames in which they are measured."""
    sizes = [None if scene.frame is None else scene.frame.target for scene in stored]
    framing = Framing(transform=transform, sizes=sizes, ids=[scene.id for scene in stored])
    return [_squared(scene, transform) for scene in stored], framing


def _measured(drawn: list[Scene], framing: Framing) -> list[Scene]:
    return [framing.measured(place, scene) for place, scene in enumerate(drawn)]


def _squared(scene: Scene, transform: SceneTransform | None) -> Scene:
    return scene if transform is None else transform.scene(scene)


def _carried(scenes: list[Scene]) -> frozenset[str]:
    """What any of some scenes has."""
    found = {
        "caption": any(scene.caption for scene in scenes),
        "relations": any(scene.relations for scene in scenes),
        "phrases": any(item.phrase for scene in scenes for item in scene.objects),
        "boxes": any(item.box for scene in scenes for item in scene.objects),
        "descriptions": any(item.description for scene in scenes for item in scene.objects),
        "attributes": any(item.attributes for scene in scenes for item in scene.objects),
        "masks": any(item.mask for scene in scenes for item in scene.objects),
        "scores": any(item.score is not None for scene in scenes for item in scene.objects),
    }
    return frozenset(name for name, there in found.items() if there)
