"""Folder: people's own pictures beside a JSON-lines file of Scenes.

A line is a Scene in the form of `scenes/scene.schema.json`, with one key more: `file`, its picture relative to the folder,
which may be left out where the picture is called after the scene's id.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageOps

from datamodules.sources.base import Content
from datamodules.sources.files import UNDER_AREA, FileSource, Picture, SampleError, existing
from scenes import Frame, Scene
from scenes.json_form import parse_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ORIENTATION = 0x0112  # EXIF


class Folder(FileSource):
    """Pictures with Scenes; what every Scene has is what the source provides.

    Pictures that their camera marked as turned are turned upright first: boxes are in what people see.

    Args:
        root: The folder.
        file: The JSON-lines file in it.
        image_format: How pictures are stored: "jpg", or "png" without loss.
        min_area: As in `FileSource`.
        short_side: As in `FileSource`.

    Raises:
        ValueError: There is no such file, it is empty, or the format is another.
    """

    name = "folder"

    def __init__(
        self,
        *,
        root: str,
        file: str = "scenes.jsonl",
        image_format: str = "jpg",
        min_area: float = 0.0,
        short_side: int | None = None,
    ) -> None:
        super().__init__(min_area=min_area, short_side=short_side)
        if image_format not in ("jpg", "png"):
            raise ValueError(f"source.image_format={image_format}: choose jpg or png")
        self.root, self.file, self.image_format = root, file, image_format
        self._path = existing(existing(Path(root), "source.root") / file, "source.file")
        with self._path.open("rb") as lines:
            self._count = sum(bool(line.strip()) for line in lines)
        if not self._count:
            raise ValueError(f"source.file: {self._path} is empty; write a Scene on each line")
        self.provides = self._provided()

    def __len__(self) -> int:
        """Lines that are not empty."""
        return self._count

    def entries(self) -> Iterator[tuple[str, bytes]]:
        """Yields the lines that are not empty, each with its place for messages."""
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{self._path.name} line {number}", line

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of a line.

        Args:
            entry: Where it stands, and the line.

        Returns:
            The scene with its picture.

        Raises:
            SampleError: The line is no Scene, or its picture cannot be used.
        """
        scene, file = _parsed(*entry)
        path = Path(self.root) / file if file is not None else self._beside(scene.id, entry[0])
        picture = _upright(Picture.open(path, f"scene {scene.id!r}"))
        frame = scene.frame or Frame(original=picture.size)
        if frame.target != picture.size:
            raise SampleError(
                f"scene {scene.id!r}: frame: target {frame.target} is not the picture's (height, width) "
                f"{picture.size}; correct it or leave the frame out"
            )
        scene, small = scene.without_small(self.min_area)
        self.count(UNDER_AREA, small)
        return self.stored(scene, picture)

    def _beside(self, name: str, where: str) -> Path:
        """The picture that is called after its scene."""
        for suffix in SUFFIXES:
            if (path := Path(self.root) / f"{name}{suffix}").is_file():
                return path
        raise SampleError(
            f"{where}: picture: no {name}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:])}) there; "
            "add it or name it with the key file"
        )

    def _provided(self) -> frozenset[str]:
        """What every line that is a Scene has; the pictures are not opened."""
        lacking: set[str] = set()
        had = {"image"}
        for where, line in self.entries():
            try:
                scene, _ = _parsed(where, line)
            except ValueError:
                continue  # counted when it is read
            of_objects = {
                "phrases": [True for _ in scene.objects],
                "boxes": [item.box is not None for item in scene.objects],
                "descriptions": [bool(item.description) for item in scene.objects],
                "attributes": [bool(item.attributes) for item in scene.objects],
                "masks": [item.mask is not None for item in scene.objects],
                "scores": [item.score is not None for item in scene.objects],
                "caption": [bool(scene.caption)],
                "relations": [bool(scene.relations)] if len(scene.objects) > 1 else [],
            }
            had |= {word for word, has in of_objects.items() if any(has)}
            lacking |= {word for word, has in of_objects.items() if not all(has)}
        return frozenset(had - lacking)


def _parsed(where: str, line: bytes) -> tuple[Scene, str | None]:
    """The Scene of a line, and the file that it names."""
    try:
        data = parse_json(line)
    except ValueError as error:
        raise SampleError(f"{where}: not JSON ({error}); write one Scene on a line") from error
    file = data.pop("file", None) if isinstance(data, dict) else None
    if file is not None and not isinstance(file, str):
        raise SampleError(f"{where}: file: {file!r} is not a path; give the picture's, relative to the folder")
    return Scene.from_json(data, where=where), file


def _upright(picture: Picture) -> Picture:
    """The picture as people see it, encoded again only where it was turned."""
    if picture.image.getexif().get(_ORIENTATION, 1) == 1:
        return picture
    turned = ImageOps.exif_transpose(picture.image)
    data = io.BytesIO()
    turned.convert("RGB").save(data, "PNG")
    return Picture(data=data.getvalue(), image=turned)
