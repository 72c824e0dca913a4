"""What a drawn picture says of itself: the scene and all settings, as JSON inside the PNG, so that it can be made again.

Only the form is here. What a command makes of a record is in `again.py`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from files.atomic import replacing
from scenes.json_form import parse_json

SCHEMA = 1  # rises when a record of before can no longer be read
KEYWORD = "scenograph"  # of the PNG's iTXt chunk
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """How a picture was made.

    Attributes:
        scene: The scene, as `Scene.to_json` has it.
        settings: Keys of `sample.py` and what they were, in plain values.
        weights_sha256: Hash over all weights that drew.
        inpaint_sha256: Hash of the file that was kept outside the boxes; None where there was none.
        made_with: Versions of libraries, the device and the number of threads: what the last digits depend on.
    """

    scene: dict[str, Any]
    settings: dict[str, Any]
    weights_sha256: str
    inpaint_sha256: str | None = None
    made_with: dict[str, str]


def save_picture(picture: Image.Image, file: str | Path, record: PictureRecord) -> None:
    """Writes a PNG with its record in it, whole or not at all.

    Args:
        picture: What was drawn.
        file: The PNG; its folder is made where it is not there.
        record: How it was drawn.
    """
    about = PngInfo()
    about.add_itxt(KEYWORD, json.dumps({"schema": SCHEMA, **asdict(record)}, ensure_ascii=False, sort_keys=True))
    with replacing(file, sync=False) as png:
        picture.save(png, format="PNG", pnginfo=about)


def read_record(file: str | Path) -> PictureRecord:
    """The record of a picture.

    Args:
        file: A PNG that `save_picture` wrote.

    Returns:
        What it says; nothing of it has been checked but its form.

    Raises:
        ValueError: The file is no PNG, or has no record, or one of another version.
    """
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            text = picture.info.get(KEYWORD)  # stands before the pixels, which are not looked at
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{file}: is no PNG that can be read ({error}); give a picture of sample.py or app.py"
        ) from None
    if text is None:
        raise ValueError(
            f"{file}: has no scene and settings in it; give a picture as sample.py or app.py wrote it, not a copy "
            "that another program saved"
        )
    try:
        content = parse_json(text)
        schema = content.pop("schema")
        if schema == SCHEMA:
            return _checked(PictureRecord(**content))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file}: its scene and settings are broken; draw from a scene file with scene=FILE") from None
    raise ValueError(
        f"{file}: its settings are of schema {schema}, this version reads {SCHEMA}; give scene=FILE run=DIR"
    )


def made_with(device: str) -> dict[str, str]:
    """What the last digits of a picture depend on beside its settings.

    Args:
        device: What draws.

    Returns:
        Versions, the device, and the threads of torch.
    """
    import torch

    about = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    return {**about, "device": device, "threads": str(torch.get_num_threads())}


def file_hash(file: str | Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _checked(record: PictureRecord) -> PictureRecord:
    kinds = {"scene": dict, "settings": dict, "weights_sha256": str, "inpaint_sha256": str | None, "made_with": dict}
    for each in fields(record):
        if not isinstance(getattr(record, each.name), kinds[each.name]):
            raise TypeError(each.name)
    return record


def compared(before: str | Path, now: str | Path) -> str:
    """How a picture that was made again compares with the first one, in a line.

    Args:
        before: The first one.
        now: The one that was made from its record.

    Returns:
        Equal, or by how much not, and what was another when they were made.
    """
    if Path(before).read_bytes() == Path(now).read_bytes():
        return f"equal to {before} byte for byte"
    with Image.open(before) as first, Image.open(now) as second:
        if first.size != second.size:
            return f"another size than {before}"
        difference = np.asarray(first.convert("RGB")).astype(int) - np.asarray(second.convert("RGB"))
    was, is_now = read_record(before).made_with, read_record(now).made_with
    others = [f"{name} {was[name]}, now {is_now.get(name)}" for name in was if is_now.get(name) != was[name]]
    because = f" (made with {'; '.join(others)})" if others else ""
    if not difference.any():
        return f"the same pixels as {before}{because}"
    share, most = (difference != 0).any(axis=-1).mean(), abs(difference).max()
    return f"differs from {before} in {share:.1%} of the pixels, by at most {most} of 255{because}"
