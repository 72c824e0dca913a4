"""IGLIGEN's data: detections on SA-1B in the centre square of each picture, with the latents of that square.

Latents are already multiplied by the autoencoder's scaling factor, so that the denoiser takes them as they are; they cannot
be mirrored or cropped. The pictures themselves are read in ``sa1b.py``, which takes boxes from here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.safe_pickle import PickleRefused, load_npy, npy_shape
from datamodules.sources.base import Content, LatentForm, LeftOut
from datamodules.sources.files import FileSource, SampleError, as_boxes, centre_window, existing, joined
from scenes import Frame, Scene, SceneObject, boxes

SCALE = 8  # pixels to a cell, in every autoencoder that these latents come from
WITHOUT_BOXES = "pictures without boxes"
UNDER_SCORE = "boxes under min_score"
TAR = "tar"  # in a scene's provenance: SA-1B's tar of the picture, by which the published files are named


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What a file of boxes says of one picture, as it is stored.

    Attributes:
        caption: Text of the picture.
        boxes: (n, 4) cxcywh in [0, 1] of the centre square.
        scores: (n,) confidences.
        phrases: n texts.
        size: (height, width) px of the picture, where the file tells it.
    """

    caption: Any
    boxes: Any
    scores: Any
    phrases: Any
    size: Any = None


Entry = tuple[str, int, np.ndarray, Detections | None, Any]


def read_detections(path: Path) -> dict[int, Detections]:
    """The rows of a file of boxes by the number of their picture.

    Args:
        path: `boxes/sa_NNNNNN.npy`, with or without the column of sizes.

    Returns:
        What each row says, not yet checked.

    Raises:
        PickleRefused: The file cannot be read, or not safely.
        SampleError: It has other columns.
    """
    rows = load_npy(path)
    if rows.ndim != 2 or rows.shape[1] not in (5, 6):
        raise SampleError(f"{path}: of shape {rows.shape}, where boxes have 5 or 6 columns; give IGLIGEN's boxes")
    found = {}
    for number, caption, places, scores, phrases, *size in rows:
        found[_number(number, path)] = Detections(
            caption=caption, boxes=places, scores=scores, phrases=phrases, size=size[0] if size else None
        )
    return found


def read_sizes(path: Path) -> dict[int, Any]:
    """(height, width) by the number of the picture, of a file of `[number, (height, width)]` rows."""
    rows = load_npy(path)
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise SampleError(f"{path}: of shape {rows.shape}, where sizes have 2 columns; give IGLIGEN's sizes")
    return {_number(number, path): size for number, size in rows}


def _number(value: Any, path: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise SampleError(f"{path}: {value!r} is no number of a picture; fetch the file again") from error


def detected_objects(source: FileSource, where: str, found: Detections, *, min_score: float) -> tuple[SceneObject, ...]:
    """The objects of a picture, in the frame of its centre square.

    Args:
        source: Checks and counts.
        where: The sample, for messages.
        found: What the file says.
        min_score: Boxes of lower confidence go, and are counted.

    Returns:
        The objects that are left.

    Raises:
        SampleError: Phrases, scores and boxes are not as many, or one of them is unsound.
    """
    places = boxes.to_xyxy(as_boxes(found.boxes, where), "cxcywh")
    try:
        scores = np.asarray(found.scores, np.float64).reshape(-1)
        phrases = list(found.phrases)
    except (TypeError, ValueError) as error:
        raise SampleError(f"{where}: phrases, scores: cannot be read ({error}); leave the sample out") from error
    if not len(places) == len(scores) == len(phrases):
        raise SampleError(
            f"{where}: boxes, scores, phrases: {len(places)}, {len(scores)} and {len(phrases)} of them; "
            "give one for each object"
        )
    if not np.isfinite(scores).all():
        raise SampleError(f"{where}: scores: not finite; mend them or leave the sample out")
    sure = scores >= min_score
    source.count(UNDER_SCORE, int((~sure).sum()))
    phrases = [phrase for phrase, kept in zip(phrases, sure, strict=True) if kept]
    details = [{"score": score} for score in scores[sure].tolist()]
    return source.objects(where, phrases, places[sure], details=details)


def size_of(value: Any, where: str) -> tuple[int, int]:
    """(height, width) px as a file tells it.

    Args:
        value: What it has.
        where: The sample, for the message.

    Returns:
        Two whole numbers.

    Raises:
        SampleError: They are not, or not of a picture.
    """
    try:
        height, width = (int(v) for v in value)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise SampleError(f"{where}: size: {value!r} is no (height, width); mend it or leave the sample out")
    return height, width


class Igligen(FileSource):
    """Latents of centre squares with a caption and scored boxes, joined by the number of the picture.

    Args:
        root: Folder with `latents/` and `boxes/`.
        boxes: Folder of the boxes, if it is not `root/boxes`.
        sizes: Folder of `[number, (height, width)]` files, for boxes without sizes.
        scaling_factor: Factor of the autoencoder that made the latents, by which they are already multiplied.
        min_score: Boxes of lower confidence go; the publishers read from .25 on.
        min_area: As in `FileSource`.
        tolerance: As in `FileSource`; large, because the published boxes leave the centre square by as much as the
            picture goes on beside it, and are published to be cut.

    Raises:
        ValueError: The folders are not there, or have no shard in common.
    """

    provides = frozenset({"latents", "caption", "boxes", "phrases", "scores"})
    name = "igligen"

    def __init__(
        self,
        *,
        root: str,
        boxes: str | None = None,
        sizes: str | None = None,
        scaling_factor: float = 0.13025,
        min_score: float = 0.25,
        min_area: float = 0.0,
        tolerance: float = 1.0,
    ) -> None:
        super().__init__(min_area=min_area, tolerance=tolerance)
        self.root, self.boxes, self.sizes = root, boxes, sizes
        self.scaling_factor, self.min_score = scaling_factor, min_score
        if not (latents := Path(root) / "latents").is_dir():
            raise ValueError(
                f"source.root={root}: has no folder latents; give the folder that holds latents and boxes, and boxes "
                "that lie elsewhere as source.boxes=DIR (without latents they go with pictures: source=sa1b)"
            )
        self._latents = latents
        self._boxes = existing(Path(boxes) if boxes else Path(root) / "boxes", "source.boxes")
        self._sizes = existing(Path(sizes), "source.sizes") if sizes else None
        names = [{path.name for path in folder.glob("*.npy")} for folder in (self._latents, self._boxes)]
        self._shards = sorted(names[0] & names[1])
        self._alone = sorted(names[0] ^ names[1])
        if not self._shards:
            raise ValueError(f"source.root={root}: no .npy file is both in latents and in {self._boxes}; give the root")

    def __len__(self) -> int:
        """Rows of boxes, by the headers of their files."""
        return sum(map(self.size_of, range(self.files())))

    def files(self) -> int:
        """Pairs of files of latents and boxes."""
        return len(self._shards)

    def size_of(self, file: int) -> int:
        """Rows of boxes of a pair of files, by the header."""
        return npy_shape(self._boxes / self._shards[file])[0]

    def entries_of(self, file: int, start: int = 0) -> Iterator[Entry]:
        """Yields the entries of a pair of files, which is in memory as long.

        Args:
            file: Number of the pair.
            start: Place of the first entry.

        Yields:
            Name of the files; number, latent, detections and size of a picture.
        """
        name = self._shards[file]
        try:
            found = read_detections(self._boxes / name)
            latents = self._read_latents(self._latents / name)
            sizes = read_sizes(self._sizes / name) if self._sizes else {}
        except (PickleRefused, SampleError, OSError) as error:
            self.left_out.skip(error, samples=self.size_of(file))
            return
        if alone := len(found.keys() - latents.keys()):
            self.left_out.counts["boxes without a latent"] += alone
        for number in sorted(latents)[start:]:
            row = found.get(number)
            yield (
                Path(name).stem,
                number,
                latents[number],
                row,
                sizes.get(number, row.size if row is not None else None),
            )

    def report(self, total: LeftOut) -> list[str]:
        """Files that are of no use.

        Args:
            total: The account of all files.

        Returns:
            A line, if there are any.
        """
        if not self._alone:
            return []
        return [f"{len(self._alone)} files of latents or boxes alone: {joined(self._alone)}"]

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of a latent.

        Args:
            entry: Its file and number, the latent, what was detected and the size of the picture.

        Returns:
            The scene with the latent, or the reason where nothing was detected.

        Raises:
            SampleError: Something of it is unsound.
        """
        file, number, latent, found, size = entry
        where = f"sa_{number}"
        if found is None:
            return WITHOUT_BOXES
        if not isinstance(found.caption, str):
            raise SampleError(f"{where}: caption: is of type {type(found.caption).__name__}; leave the sample out")
        if not np.isfinite(latent).all():
            raise SampleError(f"{where}: latent: holds numbers that are not finite; encode the picture again")
        assert self.latent_form is not None
        frame = None
        if size is None:
            self.count("sizes of pictures unknown")
        else:
            size = size_of(size, where)
            frame = Frame(original=size, crop=centre_window(size), target=self.latent_form.pixels)
        scene = Scene(
            id=where,
            caption=str(found.caption),
            objects=detected_objects(self, where, found, min_score=self.min_score),
            frame=frame,
            source=self.name,
            provenance={TAR: file},
        )
        return scene, latent

    def _read_latents(self, path: Path) -> dict[int, np.ndarray]:
        """Latents by the number of their picture."""
        content = load_npy(path)
        content = content.item() if content.shape == () else None
        if not isinstance(content, Mapping) or not {"indices", "latents"} <= content.keys():
            raise SampleError(f"{path}: is no dict of indices and latents; give IGLIGEN's latents")
        numbers, latents = content["indices"], np.asarray(content["latents"])
        if latents.ndim != 4 or latents.dtype not in (np.float16, np.float32) or len(numbers) != len(latents):
            raise SampleError(
                f"{path}: {len(numbers)} indices with latents {latents.shape} {latents.dtype}; "
                "give (N, C, h, w) float16 or float32 with N indices"
            )
        form = LatentForm(
            channels=latents.shape[1],
            height=latents.shape[2],
            width=latents.shape[3],
            scale=SCALE,
            scaling_factor=self.scaling_factor,
        )
        if self.latent_form not in (None, form):
            raise SampleError(
                f"{path}: latents {form.shape} where the files before have {self.latent_form.shape}; "
                "prepare each size by itself"
            )
        self.latent_form = form
        return {_number(number, path): latent for number, latent in zip(numbers, latents, strict=True)}
