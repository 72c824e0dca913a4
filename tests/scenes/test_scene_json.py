"""The JSON form of scenes: exact round trips, and errors that name file, field and the right word."""

import json
from dataclasses import fields

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from scenes.checks import DEEPEST
from scenes.scene import SCHEMA, Frame, Relation, Scene, SceneError, SceneObject, load_scene, save_scene


def random_scene(seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    objects = []
    for index in range(int(rng.integers(0, 9))):
        corners = np.sort(rng.uniform(size=(2, 2)), 0)
        objects.append(
            SceneObject(
                phrase=f"ding {index} ä",
                label="ding" if rng.uniform() < 0.5 else "",
                attributes=("rot",) * int(rng.integers(0, 3)),
                box=tuple(corners.ravel()) if rng.uniform() < 0.8 else None,
                description="Ein Satz." if rng.uniform() < 0.5 else "",
                score=float(rng.choice([0.0, 0.3])) if rng.uniform() < 0.5 else None,
                mask={"size": [4, 6], "counts": "h0"} if rng.uniform() < 0.3 else None,
                is_crowd=bool(rng.uniform() < 0.3),
            )
        )
    count = len(objects)
    relations = [Relation(subject=i, predicate="by", object=(i + 1) % count) for i in range(count) if count > 1]
    frame = Frame(original=(300, 400), crop=(1, 2, 200, 300), target=(20, 30)) if seed % 2 else None
    return Scene(
        id=str(seed),
        caption="" if seed % 3 else "cap",
        objects=tuple(objects),
        relations=tuple(relations),
        frame=frame,
        source="" if seed % 5 else "hand",
        provenance={"version": seed} if seed % 4 else {},
    )


@pytest.mark.parametrize("seed", range(12))
def test_round_trip_is_exact_and_fits_the_schema(seed, tmp_path):
    scene = random_scene(seed)
    data = json.loads(json.dumps(scene.to_json()))
    assert Scene.from_json(data) == scene
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(data)
    save_scene(scene, tmp_path / "scene.json")
    assert load_scene(tmp_path / "scene.json") == scene


def test_empty_fields_are_left_out():
    assert Scene(id="a").to_json() == {"id": "a"}
    bare = Scene(id="a", objects=(SceneObject(phrase="x"),))
    assert bare.to_json() == {"id": "a", "objects": [{"phrase": "x"}]}
    assert Scene(id="a", objects=(SceneObject(phrase="x", score=0.0),)).to_json()["objects"][0]["score"] == 0.0


def test_what_is_given_back_is_a_copy():
    scene = Scene(id="a", provenance={"tool": {"name": "x"}})
    scene.to_json()["provenance"]["tool"]["name"] = "y"
    assert scene.provenance == {"tool": {"name": "x"}}
    data = {"id": "a", "objects": [{"phrase": "x"}], "frame": {"original": [4, 6]}}
    Scene.from_json(data)
    assert data == {"id": "a", "objects": [{"phrase": "x"}], "frame": {"original": [4, 6]}}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"id": "a", "captoin": "x"}, r"scene 'a': captoin: unknown key 'captoin'; did you mean 'caption'\?"),
        (
            {"id": "a", "objects": [{"phrase": "x", "bbox": [0, 0, 1, 1]}]},
            r"objects\[0\]\.bbox: .*mean 'box'",
        ),
        ({"id": "a", "objects": [{"label": "x"}]}, r"objects\[0\]\.phrase: missing; add the key 'phrase'"),
        ({"id": "a", "objects": [{"phrase": "x", "zzz": 1}]}, "the keys are phrase, label"),
        ({"id": "a", "objects": {"phrase": "x"}}, "objects: .* is of type dict; give a list"),
        ({"id": "a", "objects": ["x"]}, r"objects\[0\]: 'x' is of type str; give a dict"),
        ({"id": "a", "relations": [{"subject": 0, "object": 1}]}, r"relations\[0\]\.predicate: missing"),
        ({"id": "a", "frame": {"size": [1, 2]}}, r"frame\.size: unknown key"),
        ({"id": "a", "frame": {"original": [1]}}, "scene 'a': frame: original: .* not 2 whole numbers"),
        ({"caption": "x"}, "scene: id: missing"),
        ([], "scene: scene: .* is of type list"),
    ],
)
def test_wrong_keys_are_answered_with_the_right_one(data, said):
    with pytest.raises(SceneError, match=said):
        Scene.from_json(data)


def test_where_heads_every_message():
    for data in ({"id": "a", "x": 1}, {"id": "a", "objects": [{"phrase": ""}]}, {"id": "", "caption": "b"}):
        with pytest.raises(SceneError, match=r"^shard-3\.tar:12: "):
            Scene.from_json(data, where="shard-3.tar:12")


def test_files_that_are_not_scenes_are_refused_by_name(tmp_path):
    path = tmp_path / "scene.json"
    with pytest.raises(SceneError, match=r"scene\.json: No such file"):
        load_scene(path)
    path.write_text('{"id": "a",\n "caption" "b"}')
    with pytest.raises(SceneError, match=r"scene\.json: line 2, column 12: .*; correct the JSON"):
        load_scene(path)
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(SceneError, match=r"scene\.json: byte 8: .*UTF-8"):
        load_scene(path)
    path.write_text('{"id": "a", "objects": [{"phrase": "x", "box": [0, 0, 2, 1]}]}')
    with pytest.raises(SceneError, match=r"scene\.json: scene 'a': objects\[0\]\.box: .* leaves"):
        load_scene(path)
    # What Python's records would take as well: a whole number written with a point.
    path.write_text('{"id": "a", "frame": {"original": [4.5, 6]}}')
    with pytest.raises(SceneError, match=r"scene\.json: .*original"):
        load_scene(path)


def test_the_schema_knows_every_field_and_no_other():
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    parts = {
        Scene: schema,
        **{k: schema["$defs"][k.__name__.removeprefix("Scene").lower()] for k in (SceneObject, Relation, Frame)},
    }
    for kind, part in parts.items():
        assert list(part["properties"]) == [field.name for field in fields(kind)]
        assert part["additionalProperties"] is False


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"id": "a", "provenance": ' + '{"b": ' * 600 + "1" + "}" * 601, "provenance"),
        ('{"id": "a", "objects": [{"phrase": "x", "box": [' + "9" * 400 + ", 0, 1, 1]}]}", r"objects\[0\]\.box"),
        ('{"id": "a", "objects": [{"phrase": "x", "score": ' + "9" * 400 + "}]}", r"objects\[0\]\.score"),
        ('{"id": "a", "objects": [{"phrase": "x", "score": ' + "9" * 5000 + "}]}", "digits"),
    ],
)
def test_depths_and_numbers_beyond_python_are_refused_by_name(text, field, tmp_path):
    path = tmp_path / "scene.json"
    path.write_text(text)
    with pytest.raises(SceneError, match=rf"^{path}: .*{field}"):
        load_scene(path)


def test_a_provenance_as_deep_as_allowed_goes_round(tmp_path):
    nested = "end"
    for _ in range(DEEPEST - 1):
        nested = [nested]
    scene = Scene(id="a", provenance={"nested": nested})
    save_scene(scene, tmp_path / "scene.json")
    assert load_scene(tmp_path / "scene.json") == scene
    with pytest.raises(SceneError, match="provenance"):
        Scene(id="a", provenance={"nested": [nested]})


@pytest.mark.parametrize("name", ["folder.json", "bytes.json"])
def test_a_file_that_is_no_text_is_named_once(name, tmp_path):
    path = tmp_path / name
    path.mkdir() if name == "folder.json" else path.write_bytes(b"\xff\xfe")
    with pytest.raises(SceneError) as caught:
        load_scene(path)
    assert str(caught.value).count(str(path)) == 1
