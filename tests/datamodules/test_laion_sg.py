"""LAION-SG written tiny: what becomes of entries and pictures, what is counted, and the bench's choice of entries."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import ShardSet, write_shards
from datamodules.sources.laion_sg import FILTERS, LIMIT, LaionSg
from datamodules.transforms import SceneTransform
from preparation.prepare import TASKS
from runtime.composition import compose
from scenes import Frame
from scenes.graph import isolated_objects, triples

WIDE = (30, 50)  # (height, width)


def entry(name, relations=1, *, picture=True, labels=("cat", "dog", "tree"), **more):
    """An entry with `relations` relations between its first two items, of which no two are alike."""
    return {
        "img_id": name,
        "name": f"{name}.jpg" if picture else f"lost_{name}.jpg",
        "caption_ori": f"a {name}",
        "score": "6.7",
        "url": "",
        "items": [{"item_id": 10 + n, "label": label, "attributes": ["red"]} for n, label in enumerate(labels)],
        "relations": [{"item1": 10, "relation": f"by {n}", "item2": 11} for n in range(relations)],
        **more,
    }


@pytest.fixture
def written(tmp_path):
    """written(entries): a folder with the entries as test.json, and a picture for each name that is not lost."""

    def write(entries):
        root = tmp_path / "laion_sg"
        (root / "data").mkdir(parents=True)
        for one in entries:
            if isinstance(one, dict) and not one["name"].startswith("lost"):
                Image.fromarray(np.full((*WIDE, 3), 90, np.uint8)).save(root / "data" / one["name"])
        (root / "test.json").write_text(json.dumps(entries))
        return {"root": str(root), "file": "test.json"}

    return write


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


def test_a_sample_is_the_graph_with_its_picture(written):
    ((scene, picture),) = LaionSg(**written([entry("a", 2)]))
    assert (scene.id, scene.caption, scene.source) == ("a", "a a", "laion_sg")
    assert triples(scene) == [("red cat", "by 0", "red dog"), ("red cat", "by 1", "red dog")]
    assert isolated_objects(scene) == [2]
    assert [item.box for item in scene.objects] == [None, None, None]
    assert scene.frame == Frame(original=WIDE)
    assert (picture.height, picture.width) == WIDE
    assert scene.provenance == {"score": "6.7"}


def test_what_is_missing_bare_or_said_twice_is_counted_and_no_fault(written):
    twice = entry("twice", 2)
    twice["relations"].append(twice["relations"][0])
    settings = written([entry("a"), entry("b", picture=False), entry("c", 0), twice])
    source = LaionSg(**settings)
    assert [scene.id for scene, _ in source] == ["a", "twice"]
    assert source.left_out.counts == {
        "pictures missing": 1,
        "entries without relations": 1,
    }
    assert source.left_out.bad == 0
    assert source.left_out.notes[:4] == [
        "read: 4 entries of test.json, 2 kept with 4 relations, 1 of them given before",
        "missing images: 1",
        "no relations: 1 left out",
        "bad entries: 0",
    ]
    source = LaionSg(**settings, keep_without_relations=True)
    assert [scene.id for scene, _ in source] == ["a", "c", "twice"]
    assert "no relations: 1 kept" in source.left_out.notes
    assert [scene.id for scene, _ in LaionSg(**settings, min_relations=2)] == ["twice"]


def test_bad_entries_are_skipped_and_counted_by_reason(written):
    loop, unknown, twice = entry("loop"), entry("unknown"), entry("ids")
    loop["relations"][0]["item2"] = 10
    unknown["relations"][0]["item1"] = 3
    twice["items"][2]["item_id"] = 10
    broken = entry("broken")
    settings = written([entry("a"), loop, unknown, twice, entry("label", labels=("cat", "")), entry("a"), broken])
    Path(settings["root"], "data", "broken.jpg").write_bytes(b"no picture")
    source = LaionSg(**settings)
    assert [scene.id for scene, _ in source] == ["a"]
    assert source.left_out.bad == 6
    assert (
        "test.json entry 1: img_id loop: relations[0]: 'by 0' relates item 10 to itself" in source.left_out.skipped[0]
    )
    assert source.left_out.notes[3] == (
        "bad entries: 6 (duplicate img_id: 1, duplicate item_id: 1, empty label: 1, relation of an item to itself: 1, "
        "relation to an unknown item: 1, unreadable: 1)"
    )
    list(source)
    assert source.left_out.notes[3].startswith("bad entries: 6 (duplicate img_id: 1,")  # not twice as many


def test_the_report_of_the_preparation(written, tmp_path, capsys):
    settings = written([entry("a"), entry("b", picture=False)])
    out = tmp_path / "out"
    arguments = [f"source.{key}={value}" for key, value in settings.items()]
    TASKS["convert"](compose("prepare", ["source=laion_sg", *arguments, f"out={out}"]))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: 1 scenes, 3 objects, 1 captions, 0 boxes dropped, 0 samples skipped"
    assert said[1:6] == [
        "  left out: pictures missing: 1",
        "  read: 2 entries of test.json, 1 kept with 1 relations",
        "  missing images: 1",
        "  no relations: 0 left out",
        "  bad entries: 0",
    ]
    assert said[6].startswith("  tokens cut: not counted, give the tokenizer's folder as source.tokenizer=DIR; 0 of 1")


def test_without_a_tokenizer_words_say_what_is_cut_at_least(written):
    long = entry("long", labels=("cat", "dog", *["a-b's 42"] * 11))
    # red cat by 0 red dog: 6; each item in no relation: red a - b 's 4 2: 7
    source = LaionSg(**written([long, entry("short")]))
    list(source)
    assert (
        f"1 of 2 graphs have more than {LIMIT} words, so that {6 + 11 * 7 - LIMIT} tokens or more"
        in (source.left_out.notes[-1])
    )


def test_a_tokenizer_counts_its_own_tokens(written, tmp_path):
    from models.text import word_tokenizer

    folder = tmp_path / "tokenizer"
    word_tokenizer(["red", "cat", "dog", "by"], max_length=77).save_pretrained(folder)
    labels = ("cat", "dog", *["cat"] * 40)  # red cat by 0 red dog, and 40 times red cat
    source = LaionSg(**written([entry("a", labels=labels)]), tokenizer=str(folder))
    list(source)
    assert source.left_out.notes[-1] == f"tokens cut: {6 + 80 - LIMIT}; 1 of 1 graphs have more than 75 tokens"
    with pytest.raises(ValueError, match=r"source\.tokenizer") as caught:
        LaionSg(root=source.root, file="test.json", tokenizer=str(tmp_path / "laion_sg"))
    one_line(caught, "holds no tokenizer")


def test_the_bench_takes_entries_of_more_than_four_relations(written):
    repeated = entry("repeated", 4)
    repeated["relations"].append(repeated["relations"][0])  # counted as published: five
    settings = written([entry("four", 4), entry("five", 5), repeated, entry("lost", 9, picture=False)])
    source = LaionSg(**settings, filter="compsg_bench")
    assert [scene.id for scene, _ in source] == ["five", "repeated"]
    assert source.left_out.counts["entries outside the filter"] == 1
    assert "filter compsg_bench: 3 of 4 entries (published: 20838 of 50000)" in source.left_out.notes


def test_a_whole_split_must_hold_as_many_as_published(written):
    choice = FILTERS["compsg_bench"]
    assert (choice.min_relations, choice.entries, choice.whole) == (5, 20838, 50000)
    settings = written([entry("a")])
    few, many = {"relations": [1] * 4}, {"relations": [1] * 5}

    def opened(wanted):
        entries = [few] * (choice.whole - wanted) + [many] * wanted
        Path(settings["root"], "test.json").write_text(json.dumps(entries))
        return LaionSg(**settings, filter="compsg_bench")

    assert len(opened(choice.entries)) == choice.whole
    with pytest.raises(ValueError, match="20839 of the 50000 entries") as caught:
        opened(choice.entries + 1)
    one_line(caught, "published are 20838", "source.filter=null source.min_relations=5")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"filter": "bench"}, ("source.filter=bench", "compsg_bench")),
        ({"filter": "compsg_bench", "min_relations": 3}, ("source.min_relations=3", "source.filter=null")),
        ({"min_relations": -1}, ("source.min_relations=-1",)),
        ({"file": "val.json"}, ("source.file", "val.json is not there")),
        ({"images": "nowhere"}, ("source.images: nowhere is not there",)),
        ({"tokenizer": "nowhere"}, ("source.tokenizer: nowhere is not there",)),
    ],
)
def test_settings_that_cannot_be_are_refused(written, settings, words):
    with pytest.raises(ValueError, match="source") as caught:
        LaionSg(**{**written([entry("a")]), **settings})
    one_line(caught, *words)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_file_that_is_no_list_is_refused(written, content):
    settings = written([entry("a")])
    Path(settings["root"], "test.json").write_text(content)
    with pytest.raises(ValueError, match=r"source\.file") as caught:
        LaionSg(**settings)
    one_line(caught, "fetch it again")


def test_training_squashes_the_whole_picture(written, tmp_path):
    stored = ShardSet(write_shards(LaionSg(**written([entry("a")])), tmp_path / "out"))
    cfg = compose("train", ["data=laion_sg", f"data.shards={tmp_path / 'out'}", "data.resolution=20"])
    assert cfg.data.resize == "squash"
    sample = SceneTransform(resolution=20, resize=cfg.data.resize)(stored[0], 0)
    assert sample.image.shape == (3, 20, 20)
    assert sample.scene.frame == Frame(original=WIDE, crop=(0, 0, *WIDE), target=(20, 20))
    assert len(sample.scene.relations) == 1
    assert {"relations", "phrases", "attributes"} <= stored.provides
