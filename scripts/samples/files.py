"""What the samples of all forms share: sizes, a caption in other scripts, JPEG and JSON files, COCO's boxes and masks."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SIZES = ((96, 128), (128, 96), (120, 160), (112, 112), (150, 100), (100, 150), (128, 192), (96, 144))  # (h, w) px
UNICODE = "Un chien à côté d’une balle, 犬とボール – собака 🐕"


def size_of(number: int) -> tuple[int, int]:
    """(height, width) px of an image."""
    return SIZES[number % len(SIZES)]


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")


def jpeg(image: Image.Image) -> bytes:
    """The image as a small JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85, optimize=True)
    return out.getvalue()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def xywh(box: tuple[int, ...]) -> list[int]:
    """The box as x, y, width, height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed form of a mask (height, width) of bool, by its own library."""
    found: Any = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode("ascii")}
