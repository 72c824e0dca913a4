"""Relations between boxes, and graphs as triples and text."""

import math

import numpy as np
import pytest

from scenes.graph import (
    PREDICATES,
    check_relations,
    isolated_objects,
    linearise,
    related_by_boxes,
    relation_between,
    relations_from_boxes,
    triples,
)
from scenes.scene import Relation, Scene, SceneError, SceneObject

OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "surrounding",
    "surrounding": "inside",
}


def around(x: float, y: float, half: float = 0.05):
    return (x - half, y - half, x + half, y + half)


def random_boxes(count: int, seed: int) -> list:
    corners = np.random.default_rng(seed).uniform(size=(count, 2, 2))
    return [tuple(row) for row in np.concatenate([corners.min(1), corners.max(1)], -1).tolist()]


@pytest.mark.parametrize(
    ("degrees", "said"),
    # Of the subject seen from the object, clockwise from the right as y points down.
    [(0, "right of"), (44, "right of"), (46, "below"), (134, "below"), (136, "left of"), (180, "left of"),
     (-136, "left of"), (-134, "above"), (-46, "above"), (-44, "right of")],
)  # fmt: skip
def test_quarters_of_the_compass(degrees, said):
    turn = math.radians(degrees)
    subject = around(0.5 + 0.3 * math.cos(turn), 0.5 + 0.3 * math.sin(turn))
    assert relation_between(subject, around(0.5, 0.5)) == said


def test_containment_comes_before_direction():
    inner, outer = (0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.9, 0.9)
    assert relation_between(inner, outer) == "inside"
    assert relation_between(outer, inner) == "surrounding"
    touching = (0.05, 0.1, 0.2, 0.2)  # not strictly within
    assert relation_between(touching, outer) == "left of"


def test_exchanging_the_boxes_turns_the_relation_round():
    boxes = random_boxes(40, seed=0)
    for a, b in zip(boxes[:20], boxes[20:], strict=True):
        assert relation_between(b, a) == OPPOSITE[relation_between(a, b)]


def test_mirroring_the_boxes_mirrors_the_relation():
    for a, b in zip(random_boxes(20, seed=1), random_boxes(20, seed=2), strict=True):
        scene = Scene(
            id="s",
            objects=(SceneObject(phrase="a", box=a), SceneObject(phrase="b", box=b)),
            relations=relations_from_boxes([a, b]),
        ).flip()
        assert scene.relations == relations_from_boxes([item.box for item in scene.objects])


def test_each_pair_is_related_once():
    relations = relations_from_boxes(random_boxes(7, seed=3))
    assert [(r.subject, r.object) for r in relations] == [(i, j) for i in range(7) for j in range(i + 1, 7)]
    assert {r.predicate for r in relations} <= set(PREDICATES)
    check_relations(7, relations)


def test_the_nearest_are_kept():
    boxes = [around(x, 0.5, 0.01) for x in (0.1, 0.2, 0.8, 0.95)]
    relations = relations_from_boxes(boxes, max_per_object=1)
    assert [(r.subject, r.predicate, r.object) for r in relations] == [(0, "left of", 1), (2, "left of", 3)]
    assert relations_from_boxes(boxes, max_per_object=0) == ()
    assert relations_from_boxes(boxes, max_per_object=99) == relations_from_boxes(boxes)


def test_boxes_without_a_place_have_no_relations():
    boxes = [None, around(0.2, 0.5), None, around(0.7, 0.5)]
    assert relations_from_boxes(boxes) == (Relation(subject=1, predicate="left of", object=3),)
    assert relations_from_boxes([]) == relations_from_boxes([None]) == relations_from_boxes(boxes[:2]) == ()
    assert relations_from_boxes(np.array([around(0.2, 0.5), around(0.2, 0.9)]))[0].predicate == "above"


def test_a_scene_gets_the_relations_of_its_boxes():
    boxes = [(0.1, 0.1, 0.3, 0.3), None, (0.15, 0.15, 0.25, 0.25), (0.7, 0.1, 0.9, 0.3), (0.12, 0.8, 0.28, 0.9)]
    objects = tuple(SceneObject(phrase=name, box=box) for name, box in zip("abcde", boxes, strict=True))
    scene = Scene(id="s", objects=objects, relations=(Relation(subject=1, predicate="holds", object=0),))
    related = related_by_boxes(scene)
    # Centres: a and c (.2, .2), d (.8, .2), e (.2, .85). From e to d it is .6 across and .65 up, so rather up.
    assert triples(related) == [
        ("a", "surrounding", "c"),
        ("a", "left of", "d"),
        ("a", "above", "e"),
        ("c", "left of", "d"),
        ("c", "above", "e"),
        ("d", "above", "e"),
    ]
    # The centres of a and c are one; of d theirs, the earlier first; of e likewise.
    nearest = related_by_boxes(scene, max_per_object=1)
    assert triples(nearest) == [("a", "surrounding", "c"), ("a", "left of", "d"), ("a", "above", "e")]
    assert related.objects == nearest.objects == scene.objects
    assert related_by_boxes(related) == related


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="max_per_object=-1 is negative"):
        relations_from_boxes([], max_per_object=-1)


def test_check_relations_names_where():
    with pytest.raises(SceneError, match=r"^sketch: relations\[0\]\.subject: 0 .* the scene has no objects"):
        check_relations(0, [Relation(subject=0, predicate="on", object=1)], where="sketch")


def test_graph_as_triples_and_text():
    scene = Scene(
        id="s",
        objects=tuple(SceneObject(phrase=p) for p in ("red dog", "tree", "old car", "sky")),
        relations=(
            Relation(subject=2, predicate="next to", object=0),
            Relation(subject=0, predicate="under", object=2),
        ),
    )
    assert triples(scene) == [("old car", "next to", "red dog"), ("red dog", "under", "old car")]
    assert isolated_objects(scene) == [1, 3]
    assert linearise(scene) == "old car next to red dog, red dog under old car, tree, sky"
    assert linearise(scene, separator=" ") == "old car next to red dog red dog under old car tree sky"
    assert linearise(Scene(id="s")) == ""
