"""Between records, plain JSON values and files: which fields are written, and what is said of wrong keys and files.

What a whole scene looks like in JSON is put together in ``scene.py`` and told to editors by
``scene.schema.json``.
"""

import json
from copy import deepcopy
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from scenes.checks import SceneError, check_keys


def read_text(path: str | Path) -> str:
    """The text of a file.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its content.

    Raises:
        SceneError: It is not there, or is no text; the message names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SceneError(f"{path}: byte {error.start}: {error.reason}; save the file as UTF-8") from None
    except OSError as error:
        raise SceneError(f"{path}: {error.strerror}; give the path of a scene file") from None


def parse_json(text: str | bytes) -> Any:
    """The plain JSON values of a text that somebody else wrote.

    Args:
        text: The JSON.

    Returns:
        Its content.

    Raises:
        ValueError: It is not JSON, or nested more deeply than Python follows; the message says where, and names no file.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start}: {error.reason}") from None
    except ValueError:
        raise ValueError("a number has too many digits") from None


def parse_mapping(text: str | bytes, what: str) -> dict[str, Any]:
    """The mapping in a JSON text that a program wrote beside its weights or its run.

    Args:
        text: The JSON.
        what: Setting and file that it belongs to, for the message.

    Returns:
        Its content.

    Raises:
        ValueError: It is not JSON, or no mapping.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what} is no JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} holds a {type(content).__name__} where a mapping has to be; fetch it again")
    return content


def read_json(path: str | Path) -> Any:
    """The plain JSON values of a file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        SceneError: It is not there or not JSON; the message names file and place.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise SceneError(f"{path}: {error}; correct the JSON") from None


@cache
def _plan(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a record's fields, and of those that have no default."""
    known = fields(kind)
    needed = (f.name for f in known if f.default is MISSING and f.default_factory is MISSING)
    return tuple(f.name for f in known), tuple(needed)


def made(kind: type, data: Any, where: str, field: str, index: int | None = None) -> Any:
    """Make a record from a mapping of its fields.

    Args:
        kind: The record's class.
        data: The mapping.
        where: Scene or file that it belongs to, for the message.
        field: Path of the mapping, for the message; empty for the scene itself.
        index: Its place, where the field is a list.

    Returns:
        The record.

    Raises:
        SceneError: A key is unknown or missing, or ``data`` is no mapping.
    """
    # The keys are looked at only after it failed, because every sample passes here.
    try:
        return kind(**data)
    except TypeError:
        known, needed = _plan(kind)
        check_keys(data, known, needed, where, field if index is None else f"{field}[{index}]")
        raise


def filled(record: Any) -> dict[str, Any]:
    """The fields of a record that are not empty, tuples as lists; what could be changed is copied."""
    known, needed = _plan(type(record))
    out = {}
    for name in known:
        value = getattr(record, name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, dict):
            value = deepcopy(value)
        if name in needed or not (value is None or value is False or value in ("", [], {})):
            out[name] = value
    return out
