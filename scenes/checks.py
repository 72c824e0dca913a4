"""What a scene must be, and the one-line errors that say why it is not.

The functions are plain Python because every sample of every epoch passes through them; whole files are also
held against ``scene.schema.json`` by ``scene.load_scene``. The records themselves are in ``records.py`` and
``scene.py``.
"""

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any

# Rounding of published boxes: nearer to the border than this is on it, thinner than this is nothing.
TOLERANCE = 1e-6
DEEPEST = 50  # lists and mappings in one another; copying takes two of Python's 1000 frames for each


class SceneError(ValueError):
    """A scene that cannot be; the message is one line ``<where>: <field>: <what>; <way out>``."""


def as_box(value: Any) -> Any:
    """Four numbers as a tuple of floats, rounding beyond [0, 1] taken off; anything else unchanged."""
    try:
        x0, y0, x1, y1 = [v if type(v) is float else float(v + 0.0) for v in value]  # no texts: "0.5" + 0.0 fails
    except (TypeError, ValueError, OverflowError):
        return value
    if x0 < 0.0 or y0 < 0.0 or x1 > 1.0 or y1 > 1.0:
        x0, y0 = (0.0 if -TOLERANCE <= v < 0.0 else v for v in (x0, y0))
        x1, y1 = (1.0 if 1.0 < v <= 1.0 + TOLERANCE else v for v in (x1, y1))
    return (x0, y0, x1, y1)


def as_number(value: Any) -> Any:
    """A number of any library as a float; anything else unchanged."""
    try:
        return float(value + 0.0)
    except (TypeError, ValueError, OverflowError):
        return value


def as_mask(value: Any) -> Any:
    """Run lengths with a list as size and text as counts (pycocotools has bytes); anything else unchanged."""
    if not isinstance(value, dict) or value.keys() != {"size", "counts"}:
        return value
    size, counts = value["size"], value["counts"]
    return {
        "size": list(size) if isinstance(size, tuple) else size,
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def check_type(value: Any, kind: type | tuple[type, ...], where: str, field: str) -> Any:
    """Refuse a value of another type.

    Args:
        value: What was given.
        kind: The type, or the types, it must have.
        where: Scene or file that it belongs to, for the message.
        field: Path of the field, for the message.

    Returns:
        The value.

    Raises:
        SceneError: It is of another type.
    """
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)) if k is not type(None))
        raise SceneError(f"{where}: {field}: {_short(value)} is of type {type(value).__name__}; give a {kinds}")
    return value


def check_depth(value: Any, where: str, field: str) -> None:
    """Refuse values that are nested so deeply that copying them fails.

    Args:
        value: Plain JSON values.
        where: Scene or file that they belong to, for the message.
        field: Path of the field, for the message.

    Raises:
        SceneError: There are more than `DEEPEST` lists and mappings in one another.
    """
    layer = [value]
    for _ in range(DEEPEST + 1):
        layer = [each for each in layer if isinstance(each, dict | list)]
        if not layer:
            return
        layer = [inner for each in layer for inner in (each.values() if isinstance(each, dict) else each)]
    raise SceneError(f"{where}: {field}: nested deeper than {DEEPEST} levels; flatten it or leave it out")


def check_keys(data: Any, known: Collection[str], needed: Iterable[str], where: str, field: str) -> dict[str, Any]:
    """Refuse keys that mean nothing and the lack of keys that are needed.

    Args:
        data: What was given as a mapping.
        known: The keys it may have.
        needed: Those it must have.
        where: Scene or file that it belongs to, for the message.
        field: Path of the mapping, for the message; empty for the scene itself.

    Returns:
        The mapping.

    Raises:
        SceneError: It is no mapping, or its keys are others; the message says which is meant.
    """
    check_type(data, dict, where, field or "scene")
    path = f"{field}." if field else ""
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            raise SceneError(f"{where}: {path}{key}: unknown key {key!r}; {hint}")
    for key in needed:
        if key not in data:
            raise SceneError(f"{where}: {path}{key}: missing; add the key {key!r}")
    return data


def check_object(item: Any, where: str, index: int) -> None:
    """Refuse an object that no consumer could use.

    Args:
        item: A ``SceneObject``.
        where: Scene or file that it belongs to, for the message.
        index: Its place in the scene, for the message.

    Raises:
        SceneError: Its phrase is empty, its box is none, or another field has a wrong type.
    """
    phrase = item.phrase
    if not isinstance(phrase, str) or not phrase.strip():
        raise SceneError(
            f"{where}: objects[{index}].phrase: {phrase!r} is not a phrase; "
            "give the text of the object or leave the object out"
        )
    box = item.box
    if box is not None:
        try:
            x0, y0, x1, y1 = box
            inside = x0 >= 0.0 and y0 >= 0.0 and x1 <= 1.0 and y1 <= 1.0  # False for NaN
            good = inside and x1 - x0 > TOLERANCE and y1 - y0 > TOLERANCE
        except (TypeError, ValueError):
            good = False
        if not good:
            raise SceneError(f"{where}: objects[{index}].box: {_box_fault(box)}")
    if not (
        isinstance(item.label, str)
        and isinstance(item.description, str)
        and isinstance(item.is_crowd, bool)
        and isinstance(item.attributes, tuple)
        and (not item.attributes or all(isinstance(text, str) for text in item.attributes))
        and (item.score is None or (isinstance(item.score, float) and math.isfinite(item.score)))
        and (item.mask is None or _is_mask(item.mask))
    ):
        raise SceneError(f"{where}: objects[{index}].{_field_fault(item)}")


def check_relations(n_objects: int, relations: Iterable[Any], *, where: str = "relations") -> None:
    """Refuse relations that do not fit ``n_objects`` objects.

    Args:
        n_objects: How many objects the scene has.
        relations: Records with ``subject``, ``predicate`` and ``object``.
        where: Scene or file that they belong to, for the message of an error.

    Raises:
        SceneError: A relation names an object that is not there, relates an object to itself, or has no
            predicate. One that is given twice is kept: data repeats them, and what repeats counts twice in a prompt.
    """
    for index, relation in enumerate(relations):
        path = f"{where}: relations[{index}]"
        predicate = relation.predicate
        if not isinstance(predicate, str) or not predicate.strip():
            raise SceneError(f"{path}.predicate: {predicate!r} is not a predicate; give a text such as 'left of'")
        for name, place in (("subject", relation.subject), ("object", relation.object)):
            if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < n_objects:
                there = f"the objects are 0 to {n_objects - 1}" if n_objects else "the scene has no objects"
                raise SceneError(f"{path}.{name}: {place!r} is not an object; {there}")
        if relation.subject == relation.object:
            raise SceneError(
                f"{path}: {predicate!r} relates object {relation.subject} to itself; "
                "name two objects or leave the relation out"
            )


def whole_numbers(value: Any, count: int, field: str) -> tuple[int, ...]:
    """Whole numbers of any library as a tuple of Python's.

    Args:
        value: What was given.
        count: How many numbers it must hold.
        field: Path of the field, for the message.

    Returns:
        The numbers.

    Raises:
        SceneError: There are more or fewer, or they are not whole.
    """
    try:
        numbers = tuple(value)
        if len(numbers) == count and all(int(v) == v and not isinstance(v, bool) for v in numbers):
            return tuple(int(v) for v in numbers)
    except (TypeError, ValueError, OverflowError):
        pass
    raise SceneError(f"{field}: {_short(value)} is not {count} whole numbers; give pixels as whole numbers")


def _box_fault(box: Any) -> str:
    if not isinstance(box, tuple) or len(box) != 4 or not all(isinstance(v, float) for v in box):
        return f"{_short(box)} is not a box; give four numbers (left, top, right, bottom) in [0, 1]"
    text = f"({', '.join(f'{v:.6g}' for v in box)})"
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        return f"{text} holds a number that is not finite; drop the object or set its box to null"
    if x1 < x0 or y1 < y0:
        return f"{text} is inverted; give (left, top, right, bottom), or convert with scenes.boxes.to_xyxy"
    if min(box) < 0.0 or max(box) > 1.0:
        return f"{text} leaves [0, 1]; divide pixels by the picture's size, or cut with scenes.boxes.clip"
    return f"{text} has no size; drop the object or set its box to null"


def _is_mask(mask: Any) -> bool:
    return (
        isinstance(mask, dict)
        and mask.keys() == {"size", "counts"}
        and isinstance(mask["counts"], str)
        and isinstance(mask["size"], list)
        and len(mask["size"]) == 2
        and all(isinstance(v, int) and v > 0 for v in mask["size"])
    )


def _field_fault(item: Any) -> str:
    for name in ("label", "description"):
        if not isinstance(getattr(item, name), str):
            return f"{name}: {_short(getattr(item, name))} is not a text; give a string or leave it out"
    if not isinstance(item.is_crowd, bool):
        return f"is_crowd: {_short(item.is_crowd)} is not a truth value; give true or false"
    if item.mask is not None and not _is_mask(item.mask):
        return f"mask: {_short(item.mask)} is not run lengths; give {{'size': [height, width], 'counts': text}}"
    if not isinstance(item.attributes, tuple) or not all(isinstance(text, str) for text in item.attributes):
        return f"attributes: {_short(item.attributes)} is not a list of texts; give a list of strings"
    return f"score: {_short(item.score)} is not a finite number; give a number or null"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
