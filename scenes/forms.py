"""The forms in which people have scenes in files: our own JSON, LAION-SG's entries, the rich-context demo's, triples as text.

`read_scene` and `read_scenes` recognise them: a `.txt` file holds triples, a JSON mapping is told by its keys, and whatever
else is our own form, so that its errors name our fields. Pictures are read elsewhere.
"""

import re
from pathlib import Path
from typing import Any

from scenes.checks import SceneError
from scenes.json_form import read_json, read_text
from scenes.pixel_layout import is_pixel_layout, scene_json
from scenes.records import Relation, SceneObject
from scenes.scene import Scene, scene_of_file

_NUMBERED = re.compile(r"\s*\[\w+\]$")
_CAPTION = "caption:"
TRIPLE = "write 'subject | relation | object', or an object alone"


class GraphError(SceneError):
    """An entry that is no scene graph.

    Args:
        message: One line, as of every `SceneError`.
        reason: What is wrong with it, in the same words for every entry, to be counted by.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_scene(path: str | Path) -> Scene:
    """The scene of a file, in whichever form it is.

    Args:
        path: A `.txt` file of triples, or JSON: a mapping in one of the forms, or a list of one.

    Returns:
        The scene.

    Raises:
        SceneError: The file cannot be read, is none of the forms, or holds several scenes.
    """
    scenes = read_scenes(path)
    if len(scenes) != 1:
        raise SceneError(f"{path}: {len(scenes)} scenes; give a file of one, or draw them all with split={path}")
    return scenes[0]


def read_scenes(path: str | Path) -> list[Scene]:
    """The scenes of a file, in whichever form they are.

    Args:
        path: As `read_scene` takes it; a JSON list may hold any number.

    Returns:
        The scenes in their order.

    Raises:
        SceneError: The file cannot be read, or an entry is none of the forms.
    """
    if Path(path).suffix.lower() == ".txt":
        return [scene_of_triples(read_text(path), where=str(path), name=Path(path).stem)]
    content = read_json(path)
    if isinstance(content, list):
        name = Path(path).stem
        return [_scene_of(data, f"{path}: entry {n}", f"{name}_{n}") for n, data in enumerate(content)]
    return [_scene_of(content, str(path), Path(path).stem)]


def scene_of_laion_sg(entry: Any, *, where: str) -> Scene:
    """The scene of an entry of LAION-SG: items with attributes, relations between them by `item_id`; no boxes.

    A phrase is the item's attributes and label, as the published loader joins them. A triple that is given twice stays
    twice, as it does in the published prompt and averages. Items in no relation stay.

    Args:
        entry: `{img_id, caption_ori, items: [{item_id, label, attributes}], relations: [{item1, relation, item2}]}`.
        where: File or entry, for the message of an error.

    Returns:
        The scene, its id being `img_id`.

    Raises:
        GraphError: A key is missing or of another type, an item has no label or another's `item_id`, or a relation has no
            text, names an unknown item or relates an item to itself.
    """
    name = _value(entry, "img_id", (str, int), where)
    where = f"{where}: img_id {name}"
    objects: list[SceneObject] = []
    places: dict[int, int] = {}
    for index, item in enumerate(_value(entry, "items", list, where)):
        at = f"{where}: items[{index}]"
        number = _value(item, "item_id", int, at)
        if number in places:
            raise GraphError(f"{at}: item_id: {number} is there twice; mend the entry", reason="duplicate item_id")
        places[number] = index
        objects.append(_item(item, at))
    published = enumerate(_value(entry, "relations", list, where))
    relations = tuple([_relation(item, places, f"{where}: relations[{index}]") for index, item in published])
    caption = _value({"caption_ori": entry.get("caption_ori") or ""}, "caption_ori", str, where).strip()
    return Scene(id=str(name), caption=caption, objects=tuple(objects), relations=relations)


def scene_of_triples(text: str, *, where: str, name: str) -> Scene:
    """The scene of lines such as `red tall vase | on | wooden table`.

    A line without bars is an object in no relation; the same text is the same object; `dog [1]` and `dog [2]` are two
    objects of the phrase `dog`. Empty lines and lines that begin with # mean nothing; `caption: ...` is the caption.

    Args:
        text: The lines.
        where: The file, for the message of an error.
        name: The scene's id.

    Returns:
        The scene; what of a phrase is label and what attribute is left open.

    Raises:
        SceneError: A line has another form, or relates an object to itself.
    """
    caption = ""
    places: dict[str, int] = {}
    relations: list[Relation] = []
    for number, line in enumerate(text.splitlines(), start=1):
        at = f"{where}: line {number}"
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.lower().startswith(_CAPTION):
            caption = line[len(_CAPTION) :].strip()
            continue
        parts = [" ".join(part.split()) for part in line.split("|")]
        phrases = parts[::2]
        if len(parts) not in (1, 3) or not all(parts) or not all(_NUMBERED.sub("", phrase) for phrase in phrases):
            raise SceneError(f"{at}: {line.strip()!r} is no triple; {TRIPLE}")
        known = [places.setdefault(phrase, len(places)) for phrase in phrases]
        if len(parts) == 1:
            continue
        if known[0] == known[1]:
            raise SceneError(f"{at}: {parts[0]!r} is related to itself; tell two of a kind apart, such as 'dog [1]'")
        relations.append(Relation(subject=known[0], predicate=parts[1], object=known[1]))
    if not places:
        raise SceneError(f"{where}: no objects; {TRIPLE}, one on a line")
    objects = tuple(SceneObject(phrase=_NUMBERED.sub("", phrase)) for phrase in places)
    return Scene(id=name, caption=caption, objects=objects, relations=tuple(relations))


def _scene_of(data: Any, where: str, name: str) -> Scene:
    """The scene of a JSON value in one of the forms; `name` is the id of one that has none."""
    if is_pixel_layout(data):
        return Scene.from_json(scene_json(data, name=name, where=where), where=where)
    if isinstance(data, dict) and "items" in data:
        return scene_of_laion_sg(data, where=where)
    return scene_of_file(data, where=where)


def _item(item: Any, where: str) -> SceneObject:
    label = " ".join(_value(item, "label", str, where).split())
    if not label:
        raise GraphError(f"{where}: label: is empty; name the item or leave it out", reason="empty label")
    attributes = _value(item, "attributes", list, where)
    if not all(isinstance(text, str) for text in attributes):
        raise GraphError(f"{where}: attributes: not all are texts; mend the entry", reason="malformed entry")
    said = tuple(text for text in (" ".join(text.split()) for text in attributes) if text)
    return SceneObject(phrase=" ".join((*said, label)), label=label, attributes=said)


def _relation(item: Any, places: dict[int, int], where: str) -> Relation:
    predicate = " ".join(_value(item, "relation", str, where).split())
    if not predicate:
        raise GraphError(f"{where}: relation: is empty; name it or leave it out", reason="empty relation")
    ends = [_value(item, key, int, where) for key in ("item1", "item2")]
    for key, number in zip(("item1", "item2"), ends, strict=True):
        if number not in places:
            there = ", ".join(map(str, places)) or "none"
            raise GraphError(
                f"{where}: {key}: {number} is no item_id (there are {there}); mend the entry",
                reason="relation to an unknown item",
            )
    if ends[0] == ends[1]:
        raise GraphError(
            f"{where}: {predicate!r} relates item {ends[0]} to itself; mend the entry",
            reason="relation of an item to itself",
        )
    return Relation(subject=places[ends[0]], predicate=predicate, object=places[ends[1]])


def _value(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of a mapping; refused where it is missing or of another type."""
    if not isinstance(entry, dict) or key not in entry:
        raise GraphError(f"{where}: {key}: missing; mend the entry", reason="malformed entry")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GraphError(f"{where}: {key}: is of type {type(value).__name__}; mend the entry", reason="malformed entry")
    return value
