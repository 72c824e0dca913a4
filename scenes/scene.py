"""The scene, its JSON form and the padded batch of scenes.

A scene is checked when it is made (``checks.py``), so whoever holds one needs no checks of their own. Here
is also what moves boxes and relations together: mirror, crop, drop. The parts of a scene are in
``records.py``, arithmetic on bare boxes in ``boxes.py``, on masks in ``masks.py``, what relations mean in
``graph.py``, pictures of scenes in ``draw.py``.

Legend: B scenes, N objects of the largest scene.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scenes import boxes as box_math
from scenes import masks as mask_math
from scenes.checks import (
    TOLERANCE,
    SceneError,
    check_depth,
    check_object,
    check_relations,
    check_type,
)
from scenes.json_form import filled, made, read_json
from scenes.records import Frame, Relation, SceneObject

__all__ = [
    "Frame",
    "Relation",
    "Scene",
    "SceneBatch",
    "SceneError",
    "SceneObject",
    "load_scene",
    "save_scene",
]

SCHEMA = Path(__file__).with_name("scene.schema.json")
_SIDE = re.compile(r"\b(left|right)\b(?=(?: hand)?(?: side)? of\b)")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A caption, objects and relations: what sources give, conditions take and metrics compare pictures with.

    Attributes:
        id: The name of the sample; sampling noise depends on it.
        caption: Text of the whole picture; may be empty.
        objects: What is in the picture; without any, the scene is the null condition of every method.
        relations: Who does what to whom.
        frame: Where the boxes live; None where only the layout matters (a drawn scene).
        source: The data source that gave the scene.
        provenance: Tools, versions and thresholds behind the labels; anything JSON can hold.

    Raises:
        SceneError: See :meth:`check`.
    """

    id: str
    caption: str = ""
    objects: tuple[SceneObject, ...] = ()
    relations: tuple[Relation, ...] = ()
    frame: Frame | None = None
    source: str = ""
    provenance: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Bring lists to tuples and check."""
        if isinstance(self.objects, list):
            object.__setattr__(self, "objects", tuple(self.objects))
        if isinstance(self.relations, list):
            object.__setattr__(self, "relations", tuple(self.relations))
        self.check()

    def check(self) -> None:
        """Refuse what no consumer could use.

        Raises:
            SceneError: The id or a phrase is empty; a box leaves [0, 1], is inverted, has no size or holds
                NaN; a relation names an object that is not there or relates an object to itself; a field has
                another type than it says, or the provenance is nested too deeply.
        """
        if not isinstance(self.id, str) or not self.id:
            raise SceneError(f"scene: id: {self.id!r} is not a name; give a text that is not empty")
        where = f"scene {self.id!r}"
        check_type(self.caption, str, where, "caption")
        check_type(self.objects, tuple, where, "objects")
        check_type(self.relations, tuple, where, "relations")
        check_type(self.frame, (Frame, type(None)), where, "frame")
        check_type(self.source, str, where, "source")
        check_type(self.provenance, dict, where, "provenance")
        check_depth(self.provenance, where, "provenance")
        for index, item in enumerate(self.objects):
            if not isinstance(item, SceneObject):
                check_type(item, SceneObject, where, f"objects[{index}]")
            check_object(item, where, index)
        if self.relations:
            for index, relation in enumerate(self.relations):
                check_type(relation, Relation, where, f"relations[{index}]")
            check_relations(len(self.objects), self.relations, where=where)

    def to_json(self) -> dict[str, Any]:
        """The scene as plain JSON values without empty fields; :meth:`from_json` gives it back equal."""
        out = filled(self)
        if self.objects:
            out["objects"] = [filled(item) for item in self.objects]
        if self.relations:
            out["relations"] = [filled(item) for item in self.relations]
        if self.frame is not None:
            out["frame"] = filled(self.frame)
        return out

    @staticmethod
    def from_json(data: dict[str, Any], *, where: str = "scene") -> "Scene":
        """Make a scene from what :meth:`to_json` gives.

        Args:
            data: The scene as plain JSON values.
            where: File or record that ``data`` comes from, for the message of an error.

        Returns:
            The scene.

        Raises:
            SceneError: A key is unknown or missing, or the scene does not pass :meth:`check`.
        """
        if where == "scene" and isinstance(data, dict) and isinstance(data.get("id"), str):
            where = f"scene {data['id']!r}"
        values = dict(check_type(data, dict, where, "scene"))
        try:
            for name, kind in (("objects", SceneObject), ("relations", Relation)):
                if name in values:
                    items = check_type(values[name], list, where, name)
                    values[name] = tuple([made(kind, item, where, name, i) for i, item in enumerate(items)])
            if values.get("frame") is not None:
                values["frame"] = made(Frame, values["frame"], where, "frame")
            return made(Scene, values, where, "")
        except SceneError as error:
            message = str(error)
            raise SceneError(message if message.startswith(where) else f"{where}: {message}") from None

    def flip(self) -> "Scene":
        """Mirror left to right: boxes, masks and frame; ``left of`` becomes ``right of`` and the reverse.

        Caption and phrases stay as they are: whoever mirrors scenes whose texts speak of sides must know
        that.
        """
        relations = tuple(replace(item, predicate=_mirror(item.predicate)) for item in self.relations)
        frame = None if self.frame is None else self.frame.flip()
        objects = _moved(self.objects, box_math.flip, mask_math.flip)
        return replace(self, objects=objects, relations=relations, frame=frame)

    def crop(
        self, top: int, left: int, height: int, width: int, *, min_area: float = 0.01, min_visible: float = 0.0
    ) -> tuple["Scene", int]:
        """Cut a window out: boxes move and are clipped, relations follow the objects that stay.

        Args:
            top: First row of the window, in pixels of the frame's current target.
            left: First column of the window, in the same pixels.
            height: Rows of the window, the new target's height.
            width: Columns of the window, the new target's width.
            min_area: An object whose clipped box covers less than this share of the window goes; so does one
                that the window does not touch. Objects without a box stay.
            min_visible: An object goes too of whose box less than this share is in the window.

        Returns:
            The scene in the frame of the window, and how many objects went.

        Raises:
            SceneError: The scene has no frame, or the window leaves the target.
        """
        if self.frame is None:
            raise SceneError(
                f"scene {self.id!r}: frame: None, so pixels mean nothing; give the scene a Frame to crop it"
            )
        rows, columns = self.frame.target
        window = (left / columns, top / rows, (left + width) / columns, (top + height) / rows)
        frame = self.frame.cut(top, left, height, width)
        whole = box_math.crop(_box_array(self.objects), window)
        boxes = whole.clip(0, 1)
        sides, seen = boxes[:, 2:] - boxes[:, :2], box_math.area(boxes)
        hidden = seen < (1 - TOLERANCE) * min_visible * box_math.area(
            whole
        )  # exactly the share stays, whatever the rounding
        gone = (seen < min_area) | hidden | (sides <= TOLERANCE).any(-1)
        kept = [i for i, item in enumerate(self.objects) if item.box is None or not gone[i]]
        moved = _moved(
            tuple(self.objects[i] for i in kept),
            lambda _: boxes[kept],
            lambda mask: mask_math.crop(mask, window),
        )
        scene = replace(self, objects=moved, relations=_reindexed(self.relations, kept), frame=frame)
        return scene, len(self.objects) - len(kept)

    def without_small(self, min_area: float) -> tuple["Scene", int]:
        """The scene without objects whose box covers less than `min_area` of the frame, and how many those are."""
        gone = [
            item.box is not None and (item.box[2] - item.box[0]) * (item.box[3] - item.box[1]) < min_area
            for item in self.objects
        ]
        if not any(gone):
            return self, 0
        return self.only([i for i, goes in enumerate(gone) if not goes]), sum(gone)

    def only(self, kept: Sequence[int]) -> "Scene":
        """The scene with those objects alone whose places are given, in that order, and the relations between them."""
        objects = tuple(self.objects[i] for i in kept)
        return replace(self, objects=objects, relations=_reindexed(self.relations, kept))

    def without_layout(self) -> "Scene":
        """The null scene: the same id, caption, frame and source; no objects and no relations."""
        return replace(self, objects=(), relations=())


def load_scene(path: str | Path) -> Scene:
    """Read a scene from a JSON file of the form in ``scene.schema.json``; other forms are in ``forms.py``.

    Args:
        path: The file.

    Returns:
        The scene.

    Raises:
        SceneError: The file is not there, is not JSON, or is not a scene; the message names file and field.
    """
    return scene_of_file(read_json(path), where=str(path))


def scene_of_file(data: Any, *, where: str) -> Scene:
    """The scene of what a file holds, held against the schema too.

    Args:
        data: The content of the file as plain JSON values.
        where: The file, for the message of an error.

    Returns:
        The scene.

    Raises:
        SceneError: It is not a scene; the message names file and field.
    """
    # Imported here: only whole files are held against the schema, and the import is slow.
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    scene = Scene.from_json(data, where=where)
    schema = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    fault = best_match(schema.iter_errors(data))
    if fault is not None:
        raise SceneError(f"{where}: {fault.json_path[2:] or 'scene'}: {fault.message}; see {SCHEMA.name}")
    return scene


def save_scene(scene: Scene, path: str | Path) -> None:
    """Write a scene to a JSON file that :func:`load_scene` reads."""
    text = json.dumps(scene.to_json(), indent=2, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


class SceneBatch:
    """B scenes, their boxes padded to N objects: what adapters and metrics take.

    Args:
        scenes: The B scenes; N is the number of objects of the largest.
        device: Where the tensors are put; the CPU by default.

    Attributes:
        scenes: The B scenes.
        boxes: (B, N, 4) float32, xyxy in [0, 1] of each scene's frame; zeros where not valid.
        valid: (B, N) bool; False for padding and for an object without a box.
        host: Both on the CPU, for what is decided there: copied from no device.
    """

    def __init__(self, scenes: Sequence[Scene], *, device: torch.device | str | None = None) -> None:
        self.scenes = tuple(scenes)
        longest = max((len(scene.objects) for scene in self.scenes), default=0)
        boxes = np.zeros((len(self.scenes), longest, 4), np.float32)
        valid = np.zeros((len(self.scenes), longest), bool)
        for row, scene in enumerate(self.scenes):
            for column, item in enumerate(scene.objects):
                if item.box is not None:
                    boxes[row, column] = item.box
                    valid[row, column] = True
        self.host = torch.from_numpy(boxes), torch.from_numpy(valid)
        self.boxes, self.valid = self.host[0].to(device), self.host[1].to(device)

    def __len__(self) -> int:
        """How many scenes there are (B)."""
        return len(self.scenes)

    def __iter__(self) -> Iterator[Scene]:
        """The scenes in order."""
        return iter(self.scenes)

    def __getitem__(self, which: slice | Sequence[int] | torch.Tensor) -> "SceneBatch":
        """The batch of the scenes at ``which``: a slice, places, or a (B,) mask of bool."""
        if isinstance(which, slice):
            return SceneBatch(self.scenes[which], device=self.device)
        if isinstance(which, int):
            raise TypeError(f"batch[{which}] would be one scene, not a batch; use batch.scenes[{which}] or a slice")
        places = torch.as_tensor(which)
        if places.dtype == torch.bool:
            places = places.nonzero()[:, 0]
        return SceneBatch([self.scenes[i] for i in places.tolist()], device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.boxes.device

    @property
    def captions(self) -> list[str]:
        """The caption of each scene."""
        return [scene.caption for scene in self.scenes]

    @property
    def phrases(self) -> list[list[str]]:
        """The phrases of each scene, not padded: ``phrases[b][n]`` belongs to ``boxes[b, n]``."""
        return [[item.phrase for item in scene.objects] for scene in self.scenes]

    def drop(self, keep: torch.Tensor) -> "SceneBatch":
        """Replace scenes by their null scenes.

        Args:
            keep: (B,) bool, False for the scenes to replace.

        Returns:
            A batch of as many scenes, padded to the largest of what is left.

        Raises:
            ValueError: ``keep`` has another shape or type.
        """
        if keep.shape != (len(self),) or keep.dtype != torch.bool:
            raise ValueError(
                f"keep of shape {tuple(keep.shape)} and {keep.dtype} does not fit; "
                f"give one bool for each of the {len(self)} scenes"
            )
        kept = zip(self.scenes, keep.tolist(), strict=True)
        return SceneBatch([s if keeps else s.without_layout() for s, keeps in kept], device=self.device)

    def flip(self) -> "SceneBatch":
        """Mirror every scene left to right."""
        return SceneBatch([scene.flip() for scene in self.scenes], device=self.device)

    def to(self, device: torch.device | str) -> "SceneBatch":
        """The same batch with its tensors on ``device``."""
        return self if torch.device(device) == self.device else SceneBatch(self.scenes, device=device)


def _box_array(objects: Sequence[SceneObject]) -> np.ndarray:
    """Boxes (N, 4) float64, zeros where an object has none."""
    return np.array([item.box or (0.0, 0.0, 0.0, 0.0) for item in objects], np.float64).reshape(-1, 4)


def _moved(
    objects: Sequence[SceneObject],
    move_boxes: Callable[[np.ndarray], np.ndarray],
    move_mask: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[SceneObject, ...]:
    boxes = move_boxes(_box_array(objects)).tolist()
    return tuple(
        replace(
            item,
            box=None if item.box is None else tuple(box),
            mask=None if item.mask is None else move_mask(item.mask),
        )
        for item, box in zip(objects, boxes, strict=True)
    )


def _mirror(predicate: str) -> str:
    return _SIDE.sub(lambda found: "right" if found[1] == "left" else "left", predicate)


def _reindexed(relations: Sequence[Relation], kept: Sequence[int]) -> tuple[Relation, ...]:
    place = {old: new for new, old in enumerate(kept)}
    return tuple(
        Relation(subject=place[r.subject], predicate=r.predicate, object=place[r.object])
        for r in relations
        if r.subject in place and r.object in place
    )
