"""A scene while it is drawn: what of it the canvas knows, which box is which after a change, and the scene that it becomes."""

import pytest

from scenes import Relation, Scene, SceneError, SceneObject
from web.draft import SIDE, Draft

CAT = SceneObject(
    phrase="a black cat", label="cat", attributes=("black",), box=(0.1003, 0.2, 0.4, 0.6), description="It sits."
)
DOG = SceneObject(phrase="a dog", box=(0.5, 0.25, 0.8, 0.75), mask={"size": [4, 4], "counts": "04<"})
SKY = SceneObject(phrase="the sky")
SCENE = Scene(
    id="pets",
    caption="pets",
    objects=(CAT, SKY, DOG),
    relations=(Relation(subject=0, predicate="left of", object=2), Relation(subject=1, predicate="above", object=0)),
    source="coco",
)


def box(label, left, top, right, bottom):
    return {"label": label, "color": (1, 2, 3), "xmin": left, "ymin": top, "xmax": right, "ymax": bottom}


def phrases(draft):
    return [item.phrase for item in draft.items]


@pytest.fixture
def draft():
    return Draft.of(SCENE)


def test_a_scene_that_nobody_touches_stays_exactly_as_it_was(draft):
    boxes = draft.boxes()
    assert [given["label"] for given in boxes] == ["a black cat", "a dog"]
    assert (boxes[0]["xmin"], boxes[1]["ymax"]) == (round(0.1003 * SIDE), 0.75 * SIDE)
    assert draft.followed(boxes).made("pets") == SCENE
    nudged = [{**given, "xmax": given["xmax"] + 1} for given in boxes]  # what a canvas that is shown smaller rounds
    assert draft.followed(nudged).made("pets") == SCENE


def test_a_moved_box_keeps_its_object_and_loses_its_mask(draft):
    boxes = draft.boxes()
    boxes[1] |= {"xmin": 0, "xmax": 128}
    scene = draft.followed(boxes).made("pets")
    assert scene.objects[2] == SceneObject(phrase="a dog", box=(0.0, 0.25, 0.25, 0.75))
    assert (scene.objects[:2], scene.relations) == (SCENE.objects[:2], SCENE.relations)


def test_a_renamed_box_keeps_its_relations_and_loses_what_was_said_of_the_old_name(draft):
    boxes = draft.boxes()
    boxes[0]["label"] = "a white cat"
    scene = draft.followed(boxes).made("")
    assert scene.objects[0] == SceneObject(
        phrase="a white cat", box=tuple(boxes[0][k] / SIDE for k in ("xmin", "ymin", "xmax", "ymax"))
    )
    assert scene.relations == SCENE.relations


def test_a_removed_box_takes_its_relations_along(draft):
    scene = draft.followed(draft.boxes()[:1]).made("pets")
    assert [item.phrase for item in scene.objects] == ["a black cat", "the sky"]
    assert scene.relations == (Relation(subject=1, predicate="above", object=0),)
    scene = draft.followed(draft.boxes()[1:]).made("pets")
    assert ([item.phrase for item in scene.objects], scene.relations) == (["the sky", "a dog"], ())


def test_new_boxes_come_first_on_the_canvas_and_last_in_the_scene(draft):
    first, second = box("a hat", 0, 0, 50, 50), box("a ball", 60, 60, 90, 90)
    one = draft.followed([first, *draft.boxes()])
    assert phrases(one) == ["a black cat", "the sky", "a dog", "a hat"]
    two = one.followed([second, first, *draft.boxes()])
    at_once = draft.followed([second, first, *draft.boxes()])  # where the server was slower than the hand
    assert phrases(two) == phrases(at_once) == ["a black cat", "the sky", "a dog", "a hat", "a ball"]
    assert two.relations == SCENE.relations
    assert [given["label"] for given in two.boxes()] == ["a ball", "a hat", "a black cat", "a dog"]


def test_two_of_a_name_are_told_apart_by_their_places():
    twins = [box("a cat", 0, 0, 100, 100), box("a cat", 200, 200, 300, 300)]
    draft = Draft().followed(twins)
    draft = draft.related(0, "left of", 1)  # 0 is the older one, the last on the canvas
    moved = [{**twins[0], "xmin": 50, "xmax": 150}, twins[1]]
    assert draft.followed(moved).relations == draft.relations
    kept = draft.followed(moved).followed(moved[1:])
    assert [item.pixels for item in kept.items] == [(200, 200, 300, 300)]
    assert kept.relations == ()


def test_a_box_grows_from_nothing_under_the_mouse_and_is_named_at_last():
    draft = Draft().followed([box("", 10, 10, 10, 10)])
    draft = draft.followed([box("", 10, 10, 60, 80)])
    with pytest.raises(SceneError, match="^box 1: has no name; select it"):
        draft.made("")
    draft = draft.followed([box(" a kite ", 10, 10, 60, 80)])
    assert draft.names() == ["1 a kite"]
    assert draft.made(" wind ") == Scene(
        id="drawn",
        caption="wind",
        objects=(SceneObject(phrase="a kite", box=(10 / 512, 10 / 512, 60 / 512, 80 / 512)),),
    )
    flat = draft.followed([box("a kite", 10, 10, 10, 80)])
    with pytest.raises(SceneError, match=r"objects\[0\]\.box: .* has no size"):
        flat.made("")


def test_relations_are_made_between_two_and_removed(draft):
    more = draft.related(2, " looks  at ", 1)
    assert more.sentences()[-1] == "3 a dog – looks at – 2 the sky"
    assert more.made("pets").relations[-1] == Relation(subject=2, predicate="looks at", object=1)
    assert more.without_relations([0, 2]).relations == (SCENE.relations[1],)
    for given, message in (
        ((0, "left of", 0), "relates object 0 to itself"),
        ((0, " ", 2), "is not a predicate"),
    ):
        with pytest.raises(SceneError, match=message):
            draft.related(*given)


def test_what_a_browser_sends_stays_on_the_canvas():
    draft = Draft().followed([box("a", -40, 3, 700, 600)])
    assert draft.made("").objects[0].box == (0.0, 3 / SIDE, 1.0, 1.0)
