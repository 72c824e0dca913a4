"""Rows of metrics on disk: each process measures its share of the pictures, batch by batch, and appends to a file of its own.

A row is filed under what it was made of, scene and pictures, in a folder of its metric and the metric's settings. So a killed
evaluation goes on where it was, rows of other pictures are never taken for these, and whoever comes last finds all. What the
metrics are and which pictures there are is decided elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.image_sets import PictureSet
from metrics.base import Metric, Row
from scenes import Scene

ARRAY = "__array__"  # key of a JSON mapping that stands for an array: [dtype, shape, bytes in base64]


class RowStore:
    """The rows of one metric over one set of pictures, in a folder; any number of processes append.

    Args:
        folder: Where the files lie, `<writer>-<any>.jsonl`; made with the first row.
        writer: This process among those that write at the same time, such as its rank.
    """

    def __init__(self, folder: str | Path, *, writer: str = "0") -> None:
        self.folder = Path(folder)
        # A new file for each process: a line that a kill has torn is then the last of its file.
        self._own = self.folder / f"{writer}-{secrets.token_hex(6)}.jsonl"

    def keys(self) -> set[str]:
        """The keys of all rows that are there."""
        return {key for key, _ in self._lines()}

    def read(self) -> dict[str, Row]:
        """All rows by key, arrays as they were."""
        return {key: _decoded(row) for key, row in self._lines()}

    def append(self, rows: Mapping[str, Row]) -> None:
        """Keeps rows.

        Args:
            rows: By key.

        Raises:
            ValueError: A row holds what is no number, array or JSON value.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": key, "row": _encoded(row)}, ensure_ascii=False) for key, row in rows.items()]
        with self._own.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def _lines(self) -> Iterator[tuple[str, Row]]:
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        entry = json.loads(line)
                        yield entry["key"], entry["row"]
                    except (ValueError, KeyError, TypeError):
                        continue  # torn by a kill: measured again


def store_name(name: str, metric: Metric) -> str:
    """The folder of a metric's rows: its name and a hash of what rows depend on beside pictures and scenes."""
    kind = f"{type(metric).__module__}.{type(metric).__qualname__}"
    content = json.dumps([kind, metric.settings()], sort_keys=True, default=str)
    return f"{name}.{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def scene_marks(scenes: Sequence[Scene]) -> list[str]:
    """A hash of each scene."""
    return [hashlib.sha256(json.dumps(scene.to_json(), sort_keys=True).encode()).hexdigest() for scene in scenes]


def row_keys(marks: Sequence[str], sets: Sequence[PictureSet]) -> list[str | None]:
    """The key of each scene's row.

    Args:
        marks: What `scene_marks` gives.
        sets: The set that is scored, and of a metric with `pairs` that of another seed behind it.

    Returns:
        One a scene; None where a picture is not there yet.
    """
    keys: list[str | None] = []
    for place, mark in enumerate(marks):
        stamps = [pictures.stamp(place) for pictures in sets]
        whole = None if None in stamps else json.dumps([mark, *stamps])
        keys.append(None if whole is None else hashlib.sha256(whole.encode()).hexdigest()[:24])
    return keys


def batches_of(count: int, batch_size: int) -> list[range]:
    """Consecutive places in batches; the same whoever takes which, so that nobody's rounding differs."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def unmeasured(store: RowStore, keys: Sequence[str | None], batches: Sequence[range]) -> list[range]:
    """The batches of which a row is not on disk, though its pictures are there.

    Args:
        store: Where the rows are.
        keys: Of all scenes, as `row_keys` gives them.
        batches: The places to look at.

    Returns:
        Some of `batches`.
    """
    there = {None, *store.keys()}
    return [batch for batch in batches if any(keys[place] not in there for place in batch)]


def gathered(store: RowStore, keys: Sequence[str | None]) -> tuple[list[Row], int]:
    """The rows in the order of the scenes.

    Args:
        store: Where they are.
        keys: Of all scenes.

    Returns:
        The rows that are there, and how many are not.
    """
    found = store.read()
    rows = [found[key] for key in keys if key is not None and key in found]
    return rows, len(keys) - len(rows)


def _encoded(value: Any) -> Any:
    """A JSON value; arrays keep type, shape and every bit."""
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise ValueError(f"row: an array of {value.dtype} cannot be kept; give numbers")
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {ARRAY: [value.dtype.str, list(value.shape), content]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"row: {type(value).__name__} cannot be kept; give numbers, numpy arrays or JSON values")


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if ARRAY in value:
            dtype, shape, content = value[ARRAY]
            return (
                np.frombuffer(base64.b64decode(content), dtype=np.dtype(dtype)).reshape(shape).copy()
            )  # may be written to
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value
