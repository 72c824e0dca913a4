"""The published demo's layout file becomes a scene, and what it cannot mean is refused by the name of the key."""

import json

import pytest

from scenes import Frame, SceneError
from scenes.forms import read_scene

DEMO = {
    "bboxes": [[93, 355, 512, 510], [377, 0, 512, 137], [0, 0, 512, 512]],
    "labels": ["A couch with a blanket on a rug.", "A chandelier; six candles.", "A bright living room."],
}


@pytest.fixture
def loaded(tmp_path):
    """loaded(content): the scene of a file demo.json with that content."""

    def load(content):
        path = tmp_path / "demo.json"
        path.write_text(json.dumps(content))
        return read_scene(path)

    return load


def test_the_published_file_is_a_scene_of_a_square_of_512_pixels(loaded):
    scene = loaded(DEMO)
    assert (scene.id, scene.caption, scene.frame) == ("demo", "", Frame(original=(512, 512)))
    assert [item.phrase for item in scene.objects] == DEMO["labels"]
    assert [[side * 512 for side in item.box] for item in scene.objects] == DEMO["bboxes"]


def test_it_may_have_a_caption_or_nothing_at_all(loaded):
    assert loaded({**DEMO, "caption": "a living room"}).caption == "a living room"
    assert loaded({"bboxes": [], "labels": []}).objects == ()


def test_labels_that_repeat_and_boxes_that_coincide_stay_apart(loaded):
    twice = {"bboxes": [[0, 0, 9, 9]] * 2, "labels": ["a cup; a saucer"] * 2}
    assert [item.phrase for item in loaded(twice).objects] == ["a cup; a saucer"] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": ["one", "two"]}, ("bboxes, labels", "3 boxes for 2 labels")),
        ({"bboxes": [[0, 0, 513, 5]], "labels": ["a"]}, ("bboxes[0]", "leaves the square of 512 pixels")),
        ({"bboxes": [[0, -1, 5, 5]], "labels": ["a"]}, ("bboxes[0]", "leaves the square")),
        ({"bboxes": [[0, 0, float("nan"), 5]], "labels": ["a"]}, ("bboxes[0]", "leaves the square")),
        ({"bboxes": [[9, 0, 5, 5]], "labels": ["a"]}, ("bboxes[0]", "no area or is inverted")),
        ({"bboxes": [[5, 0, 5, 5]], "labels": ["a"]}, ("bboxes[0]", "no area")),
        ({"bboxes": [[0, 0, 5]], "labels": ["a"]}, ("bboxes[0]", "is not a box")),
        ({"bboxes": [["0", 0, 5, 5]], "labels": ["a"]}, ("bboxes[0]", "is not a box")),
        ({"bboxes": [[0.1, 0.2, 0.5, 1]], "labels": ["a"]}, ("bboxes", "pixels of a square of 512", "multiply them")),
        ({"bboxes": {"a": 1}}, ("bboxes", "list")),
        ({"labels": ["a", "", "c"]}, ("labels[1]", "is not a text")),
        ({"labels": ["a", 3, "c"]}, ("labels[1]", "is not a text")),
        ({"label": []}, ("label: unknown key", "did you mean 'labels'?")),
        ({"caption": 3}, ("caption", "int")),
    ],
)
def test_what_is_wrong_is_named(loaded, change, words):
    with pytest.raises(SceneError, match=r"demo\.json") as caught:
        loaded({**DEMO, **change})
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_key_that_is_missing_is_named(loaded):
    with pytest.raises(SceneError, match="labels: missing"):
        loaded({"bboxes": [[0, 0, 5, 5]]})


def test_a_scene_with_a_key_too_many_is_still_told_so_as_a_scene(loaded):
    with pytest.raises(SceneError, match="unknown key 'labels'"):
        loaded({"id": "a", "labels": ["x"]})
