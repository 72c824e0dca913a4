"""LAION-SG's JSON written again: what is published comes back as it was but for the numbers of things."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import ShardError, write_shards
from datamodules.sources.laion_sg import LaionSg
from preparation.export_laion_sg import export_laion_sg
from preparation.prepare import prepare
from runtime.composition import compose
from scenes import Frame, Relation, Scene, SceneObject
from scenes.graph import isolated_objects, triples
from tests.preparation.conftest import Listed

SIZE = (24, 40)


def without_ids(entry):
    """An entry in which relations name places, so that how things are numbered does not matter."""
    places = {item["item_id"]: place for place, item in enumerate(entry["items"])}
    return {
        **{key: entry[key] for key in ("img_id", "name", "caption_ori", "score", "url")},
        "items": [(item["label"], item["attributes"]) for item in entry["items"]],
        "relations": [(places[r["item1"]], r["relation"], places[r["item2"]]) for r in entry["relations"]],
    }


def test_what_is_published_comes_back_as_it_was(samples, tmp_path, capsys):
    root = samples / "laion_sg"
    published = json.loads((root / "train.json").read_text(encoding="utf-8"))
    there = [entry for entry in published if entry["relations"] and (root / "data" / entry["name"]).is_file()]
    shards, out = tmp_path / "shards", tmp_path / "out"
    prepare(compose("prepare", ["source=laion_sg", f"source.root={root}", f"out={shards}", "shard_size=5"]))
    prepare(compose("prepare", ["task=export", "export.form=laion_sg", f"shards={shards}", f"out={out}"]))
    items, relations = (sum(len(entry[key]) for entry in there) for key in ("items", "relations"))
    told = f"{out}: {len(there)} entries, {items} items, {relations} relations\n"
    assert capsys.readouterr().out.endswith(told)
    written = json.loads((out / "train.json").read_text())
    jpegs = {entry["name"] for entry in there if entry["name"].endswith(".jpg")}
    for entry in there:
        if entry["name"] not in jpegs:  # shards have pictures as JPEG
            entry["name"] = f"{Path(entry['name']).stem}.jpg"
    assert [without_ids(entry) for entry in written] == [without_ids(entry) for entry in there]
    assert {frozenset(entry) for entry in written} == {frozenset(entry) for entry in there}
    for key, name in (("items", "global_item_id"), ("relations", "global_relation_id")):
        numbers = [each[name] for entry in written for each in entry[key]]
        assert numbers == list(range(len(numbers)))
        kinds = {frozenset(each) for entry in there for each in entry[key]}
        assert {frozenset(each) for entry in written for each in entry[key]} == kinds
    assert {path.name for path in (out / "data").iterdir()} == {entry["name"] for entry in there}
    assert len(jpegs) > 20
    for name in jpegs:
        assert (out / "data" / name).read_bytes() == (root / "data" / name).read_bytes()
    scenes = [[replace(scene, provenance={}) for scene, _ in LaionSg(root=str(folder))] for folder in (root, out)]
    assert scenes[0] == scenes[1]


def shards_of(scenes, folder):
    def picture(number, scene):
        return Image.fromarray(np.full((*SIZE, 3), number, np.uint8))

    return write_shards(Listed(scenes, picture, provides="image caption phrases", image_format="png"), folder)


SCENE = Scene(
    id="x",
    caption="Größe",
    objects=(
        SceneObject(phrase="red old cat", label="cat", attributes=("red", "old"), box=(0, 0, 1, 1), score=0.5),
        SceneObject(phrase="dog", description="A dog."),
        SceneObject(phrase="a tree", label="tree"),
    ),
    relations=(Relation(subject=2, predicate="by", object=0),),
    frame=Frame(original=SIZE),
)
BARE = Scene(id="bare", objects=SCENE.objects[1:2], frame=Frame(original=SIZE))


def test_scenes_of_other_sources_keep_phrases_and_triples_and_the_rest_is_counted(tmp_path):
    counts = export_laion_sg(shards_of([SCENE, BARE], tmp_path / "shards"), tmp_path / "out")
    assert counts == {
        "entries": 2,
        "items": 4,
        "relations": 1,
        "boxes that the form does not hold": 1,
        "scores that the form does not hold": 1,
        "descriptions that the form does not hold": 2,
        "phrases that are not attributes and label, told as labels": 1,
        "captions missing": 1,
        "entries without relations, which the published loader passes over": 1,
    }
    first, second = json.loads((tmp_path / "out" / "train.json").read_text())
    items = [(item["label"], item["attributes"]) for item in first["items"]]
    assert items == [("cat", ["red", "old"]), ("dog", []), ("a tree", [])]
    assert first["relations"] == [{"triple_id": 0, "item1": 2, "relation": "by", "item2": 0, "global_relation_id": 0}]
    assert (first["name"], first["score"], first["url"]) == ("x.png", "", "")
    assert [item["global_item_id"] for item in second["items"]] == [3]
    (read, _), (bare, _) = LaionSg(root=str(tmp_path / "out"), keep_without_relations=True)
    assert (triples(read), isolated_objects(read)) == (triples(SCENE), isolated_objects(SCENE))
    assert (read.caption, bare.caption, bare.relations) == ("Größe", "", ())


def test_a_picture_keeps_the_name_that_it_was_published_under(tmp_path):
    names = {"a": "one.png", "b": "two.jpg", "c": "of/three.png", "d": ""}
    scenes = [replace(BARE, id=name, provenance={"name": told} if told else {}) for name, told in names.items()]
    shards = shards_of(scenes, tmp_path / "shards")
    export_laion_sg(shards, tmp_path / "out")
    entries = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [entry["name"] for entry in entries] == ["one.png", "b.png", "c.png", "d.png"]  # what is written is PNG
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == ["b.png", "c.png", "d.png", "one.png"]
    export_laion_sg(shards, tmp_path / "alone", pictures=False)
    entries = json.loads((tmp_path / "alone" / "train.json").read_text())
    assert [entry["name"] for entry in entries] == ["one.png", "two.jpg", "of/three.png", "d.png"]
    assert not list((tmp_path / "alone" / "data").iterdir())
    twice = shards_of([*scenes, replace(BARE, id="one")], tmp_path / "twice")
    with pytest.raises(ShardError, match=r"one: .*one\.png"):
        export_laion_sg(twice, tmp_path / "out_twice")
    assert not (tmp_path / "out_twice").exists()


def test_a_published_name_that_is_not_the_id_is_remembered(tmp_path):
    root = tmp_path / "published"
    (root / "data").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(root / "data" / "cat.jpg")
    item = {"item_id": 4, "label": "cat", "attributes": [], "global_item_id": 9}
    relation = {"triple_id": 0, "item1": 4, "relation": "by", "item2": 2, "global_relation_id": 3}
    entry = {"img_id": "77", "name": "cat.jpg", "caption_ori": "A cat.", "score": "6.1", "url": "http://x"}
    entry |= {"items": [item, {**item, "item_id": 2}], "relations": [relation]}
    (root / "train.json").write_text(json.dumps([entry]))
    export_laion_sg(write_shards(LaionSg(root=str(root)), tmp_path / "shards"), tmp_path / "out")
    (again,) = json.loads((tmp_path / "out" / "train.json").read_text())
    assert without_ids(again) == without_ids(entry)
    assert (tmp_path / "out" / "data" / "cat.jpg").read_bytes() == (root / "data" / "cat.jpg").read_bytes()
