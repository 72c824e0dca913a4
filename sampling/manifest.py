"""Exactly-once bookkeeping of generated pictures in a folder: a killed generation goes on where it was.

A folder holds `pictures/<scene id>.png`, or pictures beside it, and `manifest.json` (the settings that made the
pictures, size and SHA-256 of each). While pictures are being made, every writer appends to a journal of its own
(`journal-<writer>.jsonl`), so that ranks never share a file; `finish` folds the journals into the manifest.
What the settings are, how a picture is made and who makes which is decided elsewhere.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from files.atomic import write_atomically

LONGEST_NAME = 180  # file systems allow 255 bytes, and a temporary name is longer than the final one
FORMATS: dict[str, dict[str, Any]] = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95}}
WAY_OUT = "give another folder, or remove this one to make its pictures again"


@dataclass(frozen=True)
class Stamp:
    """What identifies the content of a picture file."""

    sha256: str
    size: int

    @staticmethod
    def of(content: bytes) -> "Stamp":
        """Stamps the content of a file."""
        return Stamp(hashlib.sha256(content).hexdigest(), len(content))


class Manifest:
    """The pictures of one folder, all made with one set of settings.

    Args:
        folder: Where the pictures lie; made where it is missing.
        settings: Everything that decides what the pictures look like (weights, sampler, seeds, …), as JSON
            values.
        writer: Name of this process among those that write to the folder at the same time, such as its rank.
        picture_format: "png", or "jpg" of quality 95.
        subfolder: Where in the folder the pictures lie; "" puts them beside the manifest.

    Raises:
        ValueError: The folder was made with other settings, or is not a folder of generated pictures.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        *,
        writer: str = "0",
        picture_format: str = "png",
        subfolder: str = "pictures",
    ) -> None:
        self.folder = Path(folder)
        self.pictures = self.folder / subfolder
        self.picture_format = picture_format
        if picture_format not in FORMATS:
            raise ValueError(f"picture_format={picture_format}: no such format; take {' or '.join(FORMATS)}")
        self.settings = _plain(settings)
        self.settings_hash = hashlib.sha256(_canonical(self.settings)).hexdigest()
        if not re.fullmatch(r"[\w-]+", writer):
            raise ValueError(f"writer={writer!r} goes into file names; give letters and digits, such as the rank")
        self.writer = writer
        self._stamps: dict[str, set[Stamp]] = {}
        self._open()

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Tells what has still to be made: pictures that were never written, are lost, or torn.

        Args:
            ids: The scenes that are to have a picture.

        Returns:
            Those of `ids` without a whole picture, in their order.

        Raises:
            ValueError: An id is there twice.
        """
        self.check_ids(ids)
        self._load()
        return [name for name in ids if self._found(name) is None]

    def check_ids(self, ids: Sequence[str]) -> None:
        """Refuses ids of which two would share a picture; a rank that makes a part of them gives all.

        Args:
            ids: The scenes that are to have a picture.

        Raises:
            ValueError: An id is there twice.
        """
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise ValueError(f"{self.folder}: scene id {twice[0]!r} is asked for twice; give each scene one id")

    def write(self, scene_id: str, image: Image.Image | np.ndarray) -> None:
        """Keeps the picture of a scene.

        Args:
            scene_id: The scene's.
            image: A PIL picture, or uint8 (H, W, 3).

        Raises:
            ValueError: The scene has another picture already, or the image is not one.
        """
        content = _encoded(image, FORMATS[self.picture_format], where=f"{self.folder}: scene {scene_id!r}")
        stamp = Stamp.of(content)
        there = self._found(scene_id)
        if there == stamp:
            return
        if there is not None:
            raise ValueError(
                f"{self.folder}: scene {scene_id!r} has another picture already; write only what is missing"
            )
        path = self.path(scene_id)
        write_atomically(path, content, temporary=f".{self.writer}.{path.name}.tmp", sync=False)
        # The picture first: a journal line without its picture would be the worse half. The line break comes
        # first, so that a line torn by a kill does not swallow the next one.
        with self._journal(self.writer).open("ab") as journal:
            journal.write(b"\n" + _canonical({"id": scene_id, **asdict(stamp)}))
        self._stamps[scene_id] = {stamp}

    def read(self, scene_id: str) -> Image.Image:
        """Reads the picture of a scene.

        Args:
            scene_id: The scene's.

        Returns:
            The picture, as RGB.

        Raises:
            ValueError: It is not there, or not as it was written.
        """
        if scene_id not in self._stamps:
            self._load()
        if self._found(scene_id) is None:
            raise ValueError(
                f"{self.path(scene_id)}: scene {scene_id!r} has no whole picture; make what is missing first"
            )
        with Image.open(self.path(scene_id)) as image:
            return image.convert("RGB")

    def recorded(self, scene_id: str) -> str | None:
        """The SHA-256 of a scene's picture as it was written; the file is read only where two writers differ.

        Args:
            scene_id: The scene's.

        Returns:
            The hash; None where no picture is recorded since the last look (`reload`).
        """
        known = self._stamps.get(scene_id, set())
        stamp = self._found(scene_id) if len(known) > 1 else next(iter(known), None)
        return None if stamp is None else stamp.sha256

    def reload(self) -> None:
        """Looks again at what all writers have recorded."""
        self._load()

    def path(self, scene_id: str) -> Path:
        """The file of a scene's picture, as `picture_name` calls it."""
        if not scene_id:
            raise ValueError(f"{self.folder}: a scene id is empty; give each scene an id")
        return self.pictures / f"{picture_name(scene_id)}.{self.picture_format}"

    def finish(self) -> None:
        """Folds all journals into `manifest.json`; when nobody writes any more, but several may fold at once."""
        journals = sorted(self.folder.glob("journal-*.jsonl"))
        self._load()
        found = {name: self._found(name) for name in sorted(self._stamps)}
        self._save({name: asdict(stamp) for name, stamp in found.items() if stamp is not None})
        for leftover in [*journals, *self.pictures.glob(f".*.{self.picture_format}.tmp")]:
            leftover.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._stamps)

    def _open(self) -> None:
        # Pictures are looked for first: a writer starting beside this one makes its manifest before them.
        strays = next(self.pictures.glob(f"*.{self.picture_format}"), None)
        if self._manifest.exists():
            self._load()
        elif strays is not None:
            raise ValueError(f"{self.folder}: holds pictures ({strays.name}) but no manifest.json; {WAY_OUT}")
        else:
            self._save({}, replace=False)
            self._load()  # another writer's may have come first, with other settings
        self.pictures.mkdir(parents=True, exist_ok=True)
        for torn in self.pictures.glob(f".{self.writer}.*.{self.picture_format}.tmp"):
            torn.unlink()

    def _load(self) -> None:
        # The journals first: whoever folds them writes the manifest before they go, so nothing is in neither.
        entries = [entry for journal in self.folder.glob("journal-*.jsonl") for entry in _entries(_content(journal))]
        try:
            kept = json.loads(self._manifest.read_bytes())
            settings, pictures = kept["settings"], kept["pictures"]
            stamps = {name: {Stamp(**stamp)} for name, stamp in pictures.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._manifest}: cannot be read ({error}); {WAY_OUT}") from None
        difference = _first_difference(settings, self.settings)
        if difference:
            raise ValueError(f"{self.folder}: its pictures were made with {difference}; {WAY_OUT}")
        # Two writers may have recorded one scene: all that is recorded is kept, and the file decides.
        for name, stamp in entries:
            stamps.setdefault(name, set()).add(stamp)
        self._stamps = stamps

    def _save(self, pictures: dict[str, dict[str, Any]], *, replace: bool = True) -> None:
        content = {
            "settings_sha256": self.settings_hash,
            "settings": self.settings,
            "pictures": pictures,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        # Named after the writer: processes of two machines may have one number.
        temporary = f".{self.writer}.{self._manifest.name}.tmp"
        write_atomically(self._manifest, text.encode() + b"\n", temporary=temporary, replace=replace)

    def _found(self, scene_id: str) -> Stamp | None:
        """The recorded stamp that the file on disk has, if any."""
        recorded = self._stamps.get(scene_id)
        path = self.path(scene_id)
        if not recorded or not path.exists() or path.stat().st_size not in {stamp.size for stamp in recorded}:
            return None
        stamp = Stamp.of(path.read_bytes())
        return stamp if stamp in recorded else None

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    def _journal(self, writer: str) -> Path:
        return self.folder / f"journal-{writer}.jsonl"


def picture_name(scene_id: str) -> str:
    """The name of a scene's picture without its ending: the id, characters that file names do not take percent-encoded."""
    name = quote(scene_id, safe=" ,+=@()")
    if name.startswith("."):
        name = "%2E" + name[1:]  # hidden names are the temporary ones
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 17]}-{hashlib.sha256(scene_id.encode()).hexdigest()[:16]}"
    return name


def _encoded(image: Image.Image | np.ndarray, form: dict[str, Any], *, where: str) -> bytes:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{where}: image is {image.dtype} {image.shape}; give uint8 (H, W, 3)")
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, **form)
    return buffer.getvalue()


def _content(journal: Path) -> bytes:
    try:
        return journal.read_bytes()
    except FileNotFoundError:
        return b""  # folded since it was seen: the manifest has it


def _entries(content: bytes) -> Iterator[tuple[str, Stamp]]:
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            yield entry["id"], Stamp(entry["sha256"], entry["size"])
        except (ValueError, KeyError, TypeError):
            continue  # empty, or torn by a kill: that picture is not recorded, so it is made again


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come back from JSON, so that a tuple equals its list and 5.0 equals 5."""
    plain = {}
    for name, value in settings.items():
        try:
            plain[str(name)] = json.loads(_canonical(value), parse_float=_number)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"settings.{name}: {value!r} does not fit into JSON ({error}); give plain values"
            ) from None
    return plain


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _first_difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Names the first setting, in order of its dotted name, that differs."""
    old, new = dict(_flat(then)), dict(_flat(now))
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            return f"{name}={old[name]}, which is not set now"
        if name not in old:
            return f"no {name}, which is {new[name]} now"
        if old[name] != new[name]:
            return f"{name}={old[name]}, which is {new[name]} now"
    return None


def _flat(settings: dict[str, Any], *, before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, before=f"{before}{name}.")
        else:
            yield f"{before}{name}", _canonical(value).decode()
