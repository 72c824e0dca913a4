"""Shards as IGLIGEN's files: `boxes/sa_NNNNNN.npy` and `latents/sa_NNNNNN.npy`, as `datamodules/sources/igligen.py` reads them.

Both are arrays of objects. They are written in the words of numpy 1, which numpy 2 reads too, because the published code runs on
either.

Legend: n objects of a scene, N scenes of a file, (C, h, w) a latent.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from datamodules.shard_index import LATENT, LATENT_FLIPPED, ShardError, read_index
from datamodules.sources.base import LatentForm
from datamodules.sources.files import centre_window
from datamodules.sources.igligen import TAR
from datamodules.storage import folder_at
from preparation.export_files import WITHOUT_BOX, count_untold, is_file_name, named_samples, whole_folder
from preparation.stage import Sample
from scenes import Scene
from scenes.boxes import from_xyxy

LATENTS = ("sample", "mode")
_UNTOLD = ("relations", "masks", "attributes", "descriptions")
_NUMBER = re.compile(r"(?:sa_)?(\d+)")
ROUNDING = 2  # px by which a centre square that was scaled in two steps may lie beside it
_MODULES = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"  # of numpy 2 and numpy 1, as a pickle names them


def export_igligen(
    shards: str | Path, out: str | Path, *, latents: str | None = "sample", seed: int = 0, sizes: bool = True
) -> Counter[str]:
    """Write shards as IGLIGEN's files, all or none: a pair for each tar of SA-1B that scenes come from, else for each shard.

    Args:
        shards: The shards.
        out: The folder to make, with `boxes/` and, where shards hold latents, `latents/`.
        latents: What is written of latents that are stored as moments: "sample", one draw for each scene, the same as
            `task=latents stage.output.store=sample` makes with this seed; or "mode", the mean. Latents that are stored as such
            are written as they are. None writes boxes alone.
        seed: Of the draws.
        sizes: Whether rows have a sixth column with the picture's (height, width), as IGLIGEN-XL reads them; without, five.

    Returns:
        How many "pictures", "objects", "latents" and "files" were written, and what was left out by reason.

    Raises:
        ValueError: `latents` is no choice.
        ShardError: `out` is there, the shards cannot be read, or a scene cannot be told in the form.
    """
    if latents not in (None, *LATENTS):
        raise ValueError(f"export.latents={latents}: must be one of {', '.join(LATENTS)} or null")
    index = read_index(folder_at(shards))
    form = LatentForm(**index["latents"]) if latents is not None and "latents" in index else None
    counts: Counter[str] = Counter(pictures=0, objects=0, latents=0, files=0)
    with whole_folder(Path(out)) as folder:
        for part in ("boxes", *(["latents"] if form is not None else [])):
            (folder / part).mkdir()
        for name, samples in _by_file(named_samples(shards, index, counts)):
            made = []
            for sample in samples:
                latent = None if form is None else _latent(sample, form, latents == "sample", seed, counts)
                made.append((_row(sample.scene, counts, sizes=sizes), latent))
            made.sort(key=lambda each: each[0][0])
            rows = [row for row, _ in made]
            _save(folder / "boxes" / f"{name}.npy", _objects(rows))
            if form is not None:
                content = {"indices": [row[0] for row in rows], "latents": np.stack([latent for _, latent in made])}
                _save(folder / "latents" / f"{name}.npy", np.array(content, dtype=object))
            counts["files"] += 1
    return counts


def _by_file(samples: Iterator[tuple[str, Sample]]) -> Iterator[tuple[str, Iterator[Sample]]]:
    """Yield name and samples of each file; the samples of one follow one another, though not in one shard."""
    seen: set[str] = set()
    numbers: dict[int, str] = {}

    for name, group in itertools.groupby(samples, key=_file_of):
        if name in seen or not is_file_name(name):
            fault = "comes again behind other tars" if name in seen else "cannot be the name of a file"
            raise ShardError(f"provenance: {TAR}: {name} {fault}; give shards as task=convert made them")
        seen.add(name)
        yield name, (_of_own_number(sample, numbers) for _, sample in group)


def _of_own_number(sample: Sample, numbers: dict[int, str]) -> Sample:
    """The sample, if no scene before it has its number."""
    known = numbers.setdefault(_number(sample.scene), sample.scene.id)
    if known != sample.scene.id:
        raise ShardError(f"scene {sample.scene.id}: has the number of scene {known}; give each its own")
    return sample


def _file_of(named: tuple[str, Sample]) -> str:
    shard, sample = named
    return str(sample.scene.provenance.get(TAR) or f"sa_{shard}")


def _number(scene: Scene) -> int:
    """The number of a picture, which published files join by."""
    found = _NUMBER.fullmatch(scene.id)
    if found is None:
        raise ShardError(f"scene {scene.id}: is no number such as sa_123, by which form=igligen joins; give such ids")
    return int(found[1])


def _row(scene: Scene, counts: Counter[str], *, sizes: bool) -> list[Any]:
    """Number, caption, boxes (n, 4) cxcywh and scores (n,) in float16, n phrases, and the picture's size if asked for."""
    _refuse_other_square(scene, sizes=sizes)
    boxed = [item for item in scene.objects if item.box is not None]
    for item in boxed:
        if item.score is None:
            raise ShardError(
                f"scene {scene.id}: objects: {item.phrase!r} has no score, which form=igligen needs; "
                "give shards of task=label"
            )
    count_untold(scene, _UNTOLD, counts)
    more = {WITHOUT_BOX: len(scene.objects) - len(boxed), "captions missing": not scene.caption}
    counts.update(
        {"pictures": 1, "objects": len(boxed), **{reason: int(number) for reason, number in more.items() if number}}
    )
    corners = np.array([item.box for item in boxed], np.float64).reshape(-1, 4)
    return [
        _number(scene),
        _published_caption(scene.caption),
        from_xyxy(corners, "cxcywh").astype(np.float16),
        np.array([item.score for item in boxed], np.float16),
        [item.phrase for item in boxed],
        *([tuple(scene.frame.original)] if sizes and scene.frame is not None else []),
    ]


def _published_caption(caption: str) -> str:
    """A caption as GroundingDINO was asked with it: in small letters, with a full stop behind it."""
    text = caption.lower().strip()
    return text if not text or text.endswith(".") else f"{text}."


def _refuse_other_square(scene: Scene, *, sizes: bool) -> None:
    """Reject boxes that do not lie in the centre square of the picture, which is all that the form knows."""
    if scene.frame is None:
        if sizes:
            raise ShardError(
                f"scene {scene.id}: frame: is unknown, and with it the size of the picture; set export.sizes=false"
            )
        return
    crop, target = scene.frame.crop, scene.frame.target
    square = centre_window(scene.frame.original)
    if target[0] != target[1] or any(abs(one - other) > ROUNDING for one, other in zip(crop, square, strict=True)):
        raise ShardError(
            f"scene {scene.id}: frame: its boxes lie in {crop} (top, left, height, width) of the picture, form=igligen has them "
            f"in the centre square {square}; give shards of task=latents with stage.transform.resize=crop, or of "
            "experiment=label/igligen"
        )


def _latent(sample: Sample, form: LatentForm, is_sample: bool, seed: int, counts: Counter[str]) -> np.ndarray:
    """(C, h, w) float16: what is stored, or what is made of moments."""
    where = f"scene {sample.scene.id}"
    if LATENT not in sample.members:
        raise ShardError(
            f"{where}: has no latent; run `python prepare.py task=check` on the shards, or set export.latents=null"
        )
    stored = np.load(io.BytesIO(sample.members[LATENT]), allow_pickle=False)
    if LATENT_FLIPPED in sample.members:
        counts["latents of mirrored pictures that the form does not hold"] += 1
    if form.moments:
        from preparation.latents import drawn  # here, because it brings torch

        stored = drawn(stored[None].astype(np.float32), sample.scene.id, seed=seed if is_sample else None)[0]
    with np.errstate(over="ignore"):  # told below
        latent = stored.astype(np.float16)
    if not np.isfinite(latent).all():
        raise ShardError(
            f"{where}: its latent is not finite in float16, in which form=igligen has it; leave the scene out"
        )
    counts["latents"] += 1
    return latent


def _objects(rows: list[list[Any]]) -> np.ndarray:
    """(N, 5) or (N, 6) objects, whatever they are: numpy left to itself would look into lists of one length."""
    array = np.empty((len(rows), len(rows[0])), object)
    for place, row in enumerate(rows):
        for column, value in enumerate(row):
            array[place, column] = value
    return array


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array of objects as `np.save` of numpy 1 does."""
    with path.open("wb") as file:
        npy_format.write_array_header_1_0(file, npy_format.header_data_from_array_1_0(array))
        pickle.Pickler(_ForNumpy1(file), protocol=3).dump(array)


class _ForNumpy1:
    """A file that names the module of numpy's arrays as every numpy knows it; a pickle does so once, at its beginning."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._is_first = file, True

    def write(self, data: Any) -> int:
        """Write a part of the pickle; what lies ahead of the first large array is one part."""
        if self._is_first:
            data, self._is_first = bytes(data).replace(*_MODULES, 1), False
        return self._file.write(data)
