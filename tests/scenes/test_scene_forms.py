"""Scenes in other people's forms: what each gives, worked out by hand, and one line for what is none."""

import json
from pathlib import Path

import pytest

from scenes import Relation, Scene, SceneError, SceneObject, save_scene
from scenes.forms import GraphError, read_scene, read_scenes, scene_of_laion_sg
from scenes.graph import isolated_objects, triples


def item(number, label, *attributes):
    return {"item_id": number, "label": label, "attributes": list(attributes), "global_item_id": 100 + number}


def relation(subject, text, other):
    return {"triple_id": 0, "item1": subject, "relation": text, "item2": other, "global_relation_id": 9}


def entry(items=None, relations=(), **more):
    items = [item(4, "vase", "red", "tall"), item(0, "table"), item(7, "cat", "grey")] if items is None else items
    return {
        "img_id": "12",
        "name": "12.jpg",
        "caption_ori": "A room.",
        "items": items,
        "relations": [*relations],
        **more,
    }


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


ROOM = Scene(
    id="12",
    caption="A room.",
    objects=(
        SceneObject(phrase="red tall vase", label="vase", attributes=("red", "tall")),
        SceneObject(phrase="table", label="table"),
        SceneObject(phrase="grey cat", label="cat", attributes=("grey",)),
    ),
    relations=(Relation(subject=0, predicate="on", object=1),),
)


def test_an_entry_of_laion_sg_refers_to_items_by_their_ids():
    scene = scene_of_laion_sg(entry(relations=[relation(4, "on", 0)]), where="e")
    assert scene == ROOM
    assert isolated_objects(scene) == [2]


def test_what_laion_sg_says_twice_is_kept_twice():
    said = [relation(4, "on", 0), relation(7, "near", 0), relation(4, " on", 0), relation(0, "on", 4)]
    scene = scene_of_laion_sg(entry(relations=said), where="e")
    assert triples(scene) == [
        ("red tall vase", "on", "table"),
        ("grey cat", "near", "table"),
        ("red tall vase", "on", "table"),
        ("table", "on", "red tall vase"),
    ]
    assert scene_of_laion_sg(entry(relations=said), where="e").flip().flip() == scene
    assert Scene.from_json(scene.to_json()) == scene


def test_numbers_blanks_and_missing_captions_of_published_entries():
    data = entry([item(0, " sofa ", "", " dark  blue ")], img_id=3)
    del data["caption_ori"]
    scene = scene_of_laion_sg(data, where="e")
    assert scene.id == "3"
    assert scene.objects == (SceneObject(phrase="dark blue sofa", label="sofa", attributes=("dark blue",)),)
    assert scene_of_laion_sg({**data, "caption_ori": None}, where="e").caption == ""


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (entry(relations=[relation(4, "on", 1)]), "relation to an unknown item", ("relations[0]: item2: 1", "4, 0, 7")),
        (entry(relations=[relation(7, "by", 7)]), "relation of an item to itself", ("relations[0]", "item 7")),
        (entry(relations=[relation(7, " ", 0)]), "empty relation", ("relations[0]: relation",)),
        (entry([item(1, "cat"), item(1, "dog")]), "duplicate item_id", ("items[1]: item_id: 1",)),
        (entry([item(1, "cat"), item(2, "  ")]), "empty label", ("items[1]: label",)),
        (entry([item(True, "cat")]), "malformed entry", ("items[0]: item_id: is of type bool",)),
        (entry([{"item_id": 0, "label": "cat"}]), "malformed entry", ("items[0]: attributes: missing",)),
        (entry([item(0, "cat", 3)]), "malformed entry", ("items[0]: attributes",)),
        (entry(img_id=None), "malformed entry", ("img_id: is of type NoneType",)),
        ("text", "malformed entry", ("img_id: missing",)),
    ],
)
def test_what_is_no_graph_is_refused_with_a_reason_to_count_by(data, reason, words):
    with pytest.raises(GraphError) as caught:
        scene_of_laion_sg(data, where="e")
    assert caught.value.reason == reason
    one_line(caught, "e: ", *words)


def test_every_form_of_file_gives_the_scene(tmp_path):
    save_scene(ROOM, tmp_path / "ours.json")
    published = entry(relations=[relation(4, "on", 0)])
    assert read_scene(tmp_path / "ours.json") == ROOM
    assert read_scene(written(tmp_path / "entry.json", published)) == ROOM
    assert read_scene(written(tmp_path / "list.json", [published])) == ROOM
    two = written(tmp_path / "two.json", [published, ROOM.to_json()])
    assert read_scenes(two) == [ROOM, ROOM]
    with pytest.raises(SceneError) as caught:
        read_scene(two)
    one_line(caught, two, "2 scenes", f"split={two}")


def test_triples_as_text(tmp_path):
    text = """
# a room
caption: A quiet room.
red tall vase | on | wooden table
cat
dog [1] |next   to| dog [2]
red  tall vase | left of | dog [1]
"""
    scene = read_scene(written(tmp_path / "room.txt", text))
    assert (scene.id, scene.caption) == ("room", "A quiet room.")
    assert [o.phrase for o in scene.objects] == ["red tall vase", "wooden table", "cat", "dog", "dog"]
    assert scene.relations == (
        Relation(subject=0, predicate="on", object=1),
        Relation(subject=3, predicate="next to", object=4),
        Relation(subject=0, predicate="left of", object=3),
    )
    assert isolated_objects(scene) == [2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\ndog | on", ("line 2: 'dog | on' is no triple", "subject | relation | object")),
        ("a | b | c | d", ("line 1",)),
        ("cat |  | dog", ("line 1",)),
        ("[1]", ("line 1",)),
        ("dog | by | dog", ("line 1: 'dog' is related to itself", "dog [1]")),
        ("# nothing\ncaption: x", ("no objects",)),
    ],
)
def test_a_line_that_is_no_triple_is_named(tmp_path, text, words):
    path = written(tmp_path / "a.txt", text)
    with pytest.raises(SceneError) as caught:
        read_scene(path)
    one_line(caught, path, *words)


def test_files_that_are_none_of_the_forms_are_refused_as_ours(tmp_path):
    for content, words in (("{", ("line 1, column 2",)), ({"id": "a", "things": []}, ("things",)), ([3], ("entry 0",))):
        path = written(tmp_path / "a.json", content)
        with pytest.raises(SceneError) as caught:
            read_scene(path)
        one_line(caught, path, *words)
    with pytest.raises(SceneError, match=r"nowhere\.txt: No such file"):
        read_scene(tmp_path / "nowhere.txt")


def test_the_example_says_as_text_what_it_says_as_json():
    folder = Path(__file__).parents[2] / "examples"
    text, ours = (read_scene(folder / f"four_shapes.{suffix}") for suffix in ("txt", "json"))
    assert (text.caption, triples(text)) == (ours.caption, triples(ours))
    assert {item.phrase for item in text.objects} == {item.phrase for item in ours.objects}
