"""Which training samples are held out where no validation shards are given: those whose scenes' ids have the lowest hashes.

So the choice is a function of the ids alone: the same after a resume, on any number of ranks, and of the same scenes in other
shards. Writers of shards note the lowest hashes in `index.json`, with where each sample lies in its tar: nothing else is read to
choose them, and of a tar only the sample's own bytes. The tars are opened in `shards.py`, what is left for training is ordered
in `order.py`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

NOTED = 2048  # about so many samples of a folder, whatever its size
SHARE = 10  # at most one sample in so many is held out
EVERY = 1 << 64  # more than any hash


def hash_of(scene_id: str) -> int:
    """The first 64 bits of the id's BLAKE2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(scene_id.encode(), digest_size=8).digest())


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a sample lies.

    Attributes:
        hash: Of its scene's id.
        shard: Number of the shard in its folder.
        row: Number of the sample in the shard.
        offset: Byte of the shard's file at which the header of its first member begins.
        bytes: From there to the end of its last member.
    """

    hash: int
    shard: int
    row: int
    offset: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Lowest:
    """The samples of a folder with the lowest hashes.

    Attributes:
        below: Every sample of the folder with a hash below this one is among them.
        places: In the order in which they are stored.
    """

    below: int
    places: tuple[Place, ...]


class Notes:
    """What a writer of shards notes for the index.

    Args:
        samples: About how many samples the folder will have; 0 where nobody knows, to note all of them.
    """

    def __init__(self, samples: int) -> None:
        self.below = _below_of(samples)
        self._lines: list[str] = []

    def add(self, scene_id: str, shard: str, row: int, span: range) -> None:
        """Notes a sample, if its hash is among the lowest.

        Args:
            scene_id: Of its scene.
            shard: Name of the shard.
            row: Its number in it.
            span: Bytes of the shard that it takes.
        """
        if (value := hash_of(scene_id)) < self.below:
            self._lines.append(f"{value:016x} {shard} {row} {span.start} {len(span)}")

    def to_json(self) -> dict[str, Any]:
        """As the index has it under "lowest_hashes"."""
        return {"below": f"{self.below:x}", "samples": self._lines}


def joined(notes: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The notes of all pieces of a folder as one; None where a piece has none, as those from before."""
    whole = [one for one in notes if one is not None]
    if len(whole) < len(notes) or not whole:
        return None
    lowest = min((one["below"] for one in whole), key=lambda below: int(below, 16))
    return {"below": lowest, "samples": [line for one in whole for line in one["samples"]]}


def shortened(notes: Mapping[str, Any], *, of: int | None = None) -> dict[str, Any]:
    """The notes of about `NOTED` samples of a folder.

    Args:
        notes: Of all its samples, or of a part of them.
        of: Samples of the folder; None for a part of a folder whose size is not known, of which all may be the lowest.

    Returns:
        Those of the lowest hashes.
    """
    hashes = sorted(int(line[:16], 16) for line in notes["samples"]) if of is None else []
    below = hashes[NOTED] if len(hashes) > NOTED else _below_of(of or 0)
    below = min(below, int(notes["below"], 16))
    return {"below": f"{below:x}", "samples": [line for line in notes["samples"] if int(line[:16], 16) < below]}


def _below_of(samples: int) -> int:
    """Below which about `NOTED` of so many hashes lie."""
    return EVERY if samples <= NOTED else EVERY * NOTED // samples


def lowest_of(index: Mapping[str, Any]) -> Lowest | None:
    """What an index notes; None for one from before.

    Args:
        index: The content of `index.json`.

    Returns:
        The samples with the lowest hashes.
    """
    notes = index.get("lowest_hashes")
    if notes is None:
        return None
    numbers = {entry["name"]: number for number, entry in enumerate(index["shards"])}
    places = []
    for line in notes["samples"]:
        value, rest = line.split(" ", 1)
        shard, row, offset, size = rest.rsplit(" ", 3)
        places.append(
            Place(hash=int(value, 16), shard=numbers[shard], row=int(row), offset=int(offset), bytes=int(size))
        )
    return Lowest(below=int(notes["below"], 16), places=tuple(places))


class Folder(Protocol):
    """What is chosen from: a folder of shards, as `shards.ShardSet`."""

    path: Any

    def __len__(self) -> int:
        """Samples in it."""
        ...

    def lowest(self) -> Lowest | None:
        """What its index notes."""
        ...

    def all_places(self) -> Lowest:
        """Every sample, after reading the ids of all."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is held out of some folders.

    Attributes:
        samples: (folder, place) of one sample for each scene that is held out, the lowest hash first.
        left_out: Of each folder, the rows by shard that training leaves out: every sample of those scenes.
    """

    samples: tuple[tuple[int, Place], ...]
    left_out: tuple[dict[int, tuple[int, ...]], ...]


def choose(folders: Sequence[Folder], count: int) -> HeldOut:
    """The scenes with the lowest hashes, over all folders; at most a tenth of the samples, and one at least.

    Args:
        folders: From which to choose.
        count: Most scenes.

    Returns:
        Where they lie.

    Raises:
        ValueError: Nothing would be left of a folder to train on.
    """
    found = [folder.lowest() or folder.all_places() for folder in folders]
    most = max(1, sum(len(folder) for folder in folders) // SHARE)
    scenes = _first_scenes(found, count, most)
    is_full = len(scenes) == count or sum(map(len, scenes)) >= most
    short = [number for number, one in enumerate(found) if not (is_full and scenes[-1][0][1].hash < one.below)]
    short = [
        number for number in short if found[number].below < EVERY
    ]  # some of its hashes may be lower, and are not noted
    if short:
        for number in short:
            found[number] = folders[number].all_places()
        scenes = _first_scenes(found, count, most)
    left_out: tuple[dict[int, list[int]], ...] = tuple({} for _ in folders)
    for places in scenes:
        for number, place in places:
            left_out[number].setdefault(place.shard, []).append(place.row)
    for folder, rows in zip(folders, left_out, strict=True):
        if sum(map(len, rows.values())) == len(folder):
            raise ValueError(
                f"data.validation_samples={count}: leaves none of the {len(folder)} samples of {folder.path} to train on; set "
                "data.validation_samples=0, or give data.validation_shards=DIR"
            )
    return HeldOut(
        samples=tuple(places[0] for places in scenes),
        left_out=tuple({shard: tuple(sorted(own)) for shard, own in rows.items()} for rows in left_out),
    )


def _first_scenes(found: Sequence[Lowest], count: int, most: int) -> list[list[tuple[int, Place]]]:
    """The samples of each scene that is held out; a scene that is stored several times goes with all of them."""
    places = [(number, place) for number, one in enumerate(found) for place in one.places]
    places.sort(key=lambda one: (one[1].hash, one[0], one[1].shard, one[1].row))
    scenes: list[list[tuple[int, Place]]] = []
    for number, place in places:
        if scenes and scenes[-1][0][1].hash == place.hash:
            scenes[-1].append((number, place))
        elif len(scenes) == count or sum(map(len, scenes)) >= most:
            break
        else:
            scenes.append([(number, place)])
    return scenes
