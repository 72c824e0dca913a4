"""What relations mean: which relation two boxes stand in, and a scene graph as triples or as text.

How a graph reaches a denoiser is not here but in ``models/conditioning``; the record of one relation is in
``records.py``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from scenes.checks import check_relations
from scenes.records import Box, Relation
from scenes.scene import Scene

__all__ = [
    "PREDICATES",
    "check_relations",
    "isolated_objects",
    "linearise",
    "related_by_boxes",
    "relation_between",
    "relations_from_boxes",
    "triples",
]

PREDICATES = ("left of", "right of", "above", "below", "inside", "surrounding")


def relation_between(subject_box: Box, object_box: Box) -> str:
    """How one box lies to another.

    A box strictly within the other is ``inside`` or, seen from the outer, ``surrounding``. Otherwise the
    direction from the centre of the object's box to the subject's decides, a quarter turn each.

    Args:
        subject_box: xyxy, any unit common to both.
        object_box: xyxy.

    Returns:
        One of :data:`PREDICATES`.

    Source: Johnson et al., "Image Generation from Scene Graphs" (CVPR 2018), as in
        its released loader.
    """
    sx0, sy0, sx1, sy1 = subject_box
    ox0, oy0, ox1, oy1 = object_box
    if sx0 < ox0 and sx1 > ox1 and sy0 < oy0 and sy1 > oy1:
        return "surrounding"
    if sx0 > ox0 and sx1 < ox1 and sy0 > oy0 and sy1 < oy1:
        return "inside"
    # y points down, so a positive angle is below.
    angle = math.atan2((sy0 + sy1) - (oy0 + oy1), (sx0 + sx1) - (ox0 + ox1))
    if abs(angle) >= 0.75 * math.pi:
        return "left of"
    if angle < -0.25 * math.pi:
        return "above"
    return "right of" if angle < 0.25 * math.pi else "below"


def relations_from_boxes(
    boxes: Sequence[Box | None] | np.ndarray, *, max_per_object: int | None = None
) -> tuple[Relation, ...]:
    """Relate every pair of boxes once, the earlier box as the subject.

    Args:
        boxes: xyxy in [0, 1]; None has no place and no relations.
        max_per_object: Keep of each box only the pairs with its nearest so many others (between centres; at
            equal distance the earlier one); a box still appears in the pairs that others keep. None keeps
            all.

    Returns:
        Relations between places in ``boxes``, ordered by subject, then object.

    Raises:
        ValueError: ``max_per_object`` is negative.
    """
    if max_per_object is not None and max_per_object < 0:
        raise ValueError(f"max_per_object={max_per_object} is negative; give 0 or more, or None for all pairs")
    placed = [i for i, box in enumerate(boxes) if box is not None]
    corners = np.array([boxes[i] for i in placed], np.float64).reshape(-1, 2, 2)
    centres = corners.mean(1)
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : max(len(placed) - 1, 0)][:, :max_per_object]
    pairs = {(min(i, int(j)), max(i, int(j))) for i, others in enumerate(nearest) for j in others}
    return tuple(
        Relation(
            subject=placed[i],
            predicate=relation_between(tuple(corners[i].ravel()), tuple(corners[j].ravel())),
            object=placed[j],
        )
        for i, j in sorted(pairs)
    )


def related_by_boxes(scene: Scene, *, max_per_object: int | None = None) -> Scene:
    """The scene with the relations that its boxes stand in, in place of its own.

    Johnson et al. draw one other object and the subject of the two at random for each object; here the nearest
    are taken and the earlier object is the subject, so that the same boxes always give the same graph.

    Args:
        scene: Objects without a box stay and are in no relation.
        max_per_object: As in :func:`relations_from_boxes`.

    Returns:
        The scene, all else as it was.
    """
    boxes = [item.box for item in scene.objects]
    return replace(scene, relations=relations_from_boxes(boxes, max_per_object=max_per_object))


def triples(scene: Scene) -> list[tuple[str, str, str]]:
    """The relations as (subject's phrase, predicate, object's phrase), in their order."""
    phrases = [item.phrase for item in scene.objects]
    return [(phrases[r.subject], r.predicate, phrases[r.object]) for r in scene.relations]


def isolated_objects(scene: Scene) -> list[int]:
    """The places of the objects that no relation names."""
    named = {place for r in scene.relations for place in (r.subject, r.object)}
    return [i for i in range(len(scene.objects)) if i not in named]


def linearise(scene: Scene, *, separator: str = ", ") -> str:
    """The graph as one text: its triples, then the objects in no relation, parted by commas or by what is given."""
    parts = [" ".join(triple) for triple in triples(scene)]
    return separator.join(parts + [scene.objects[i].phrase for i in isolated_objects(scene)])
