"""Scene graphs that a model writes for plain pictures."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from datamodules.shard_index import ShardError
from labelling.endpoint import Endpoint, RetryPolicy
from labelling.parts import PartMissing
from labelling.vision_language import RecordedAnswers, text_hash
from preparation.graphs import Graphs
from preparation.stage import Sample
from scenes import Frame, Scene, SceneObject
from tests.chat_server import chat_server, refuses, says

GRAPH = {
    "items": [
        {"item_id": 3, "label": "house", "attributes": ["stone", "old"]},
        {"item_id": 5, "label": "lake", "attributes": []},
        {"item_id": 8, "label": "house", "attributes": ["white"]},
    ],
    "relations": [
        {"item1": 3, "relation": "beside", "item2": 5},
        {"item1": 8, "relation": "behind", "item2": 3},
        {"item1": 3, "relation": "beside", "item2": 5},
    ],
}
PROMPT = "Write the graph. The caption is: {caption}"


def answers(**changes):
    return says(json.dumps({**GRAPH, **changes}))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


def sample(number, **fields):
    file = io.BytesIO()
    Image.fromarray(np.full((5, 8, 3), number, np.uint8)).save(file, "PNG")
    fields = {"caption": f"picture {number}", "frame": Frame(original=(5, 8)), "provenance": {"url": "u"}, **fields}
    return Sample(
        key=f"{number:04d}", scene=Scene(id=f"p{number}", **fields), members={"png": file.getvalue(), "txt": b"kept"}
    )


def stage_of(server, **settings):
    once = RetryPolicy(attempts=1, concurrent=1)
    model = Endpoint(model="annotator", base_url=server.url, patience=once, cache=settings.pop("cache", None))
    return Graphs(model=model, prompt=PROMPT, **settings).to("cpu")


def test_an_answer_becomes_the_graph_of_its_scene():
    given = sample(1)
    with chat_server(answers()) as server:
        stage = stage_of(server)
        (made,) = stage([given])
        text, picture = server.bodies[0]["messages"][0]["content"]
    assert text["text"] == "Write the graph. The caption is: picture 1"
    assert picture["type"] == "image_url"
    scene = made.scene
    phrases = [(item.phrase, item.label) for item in scene.objects]
    assert phrases == [("stone old house", "house"), ("lake", "lake"), ("white house", "house")]
    assert scene.objects[0].attributes == ("stone", "old")
    expected = (0, "beside", 1), (2, "behind", 0), (0, "beside", 1)
    assert [(item.subject, item.predicate, item.object) for item in scene.relations] == list(expected)
    assert (scene.id, scene.caption, scene.frame) == (given.scene.id, given.scene.caption, given.scene.frame)
    assert (made.key, made.members) == (given.key, given.members)
    assert scene.provenance["url"] == "u"
    told = scene.provenance["graphs"]
    assert told["model"]["model"] == "annotator"
    assert told["answered_by"] == "judge-2024-08-06"
    assert told["prompt_sha256"] == text_hash(PROMPT)
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    assert not stage.left_out.counts
    assert stage.report(stage.left_out) == [
        f"graphs: 1 answered, 0 more from the cache, 0 failed; 100 tokens in, {len(json.dumps(GRAPH).split())} out"
    ]


WRONG = [
    (says("A house by a lake."), "unparsable answer", "JSON"),
    (says('{"objects": []}'), "malformed entry", "items: "),
    (answers(items=[], relations=[]), "empty graph", "items: "),
    (answers(relations=[[3, "on", 5]]), "malformed entry", "relation: "),
    (answers(relations=[{"item1": 3, "relation": "on", "item2": 4}]), "relation to an unknown item", "item2: 4"),
    (answers(relations=[{"item1": 3, "relation": "on", "item2": 3}]), "relation of an item to itself", "itself"),
    (answers(items=[GRAPH["items"][0]] * 2, relations=[]), "duplicate item_id", "3 "),
    (says(None, refusal="I cannot"), "declined", "I cannot"),
    (says('{"items": [', finish="length"), "cut answer", "sampling.max_tokens"),
    (refuses(500), "status 500", "status 500"),
]


def test_what_is_no_graph_is_told_and_the_others_go_on():
    good = answers()
    with chat_server(good, *(reply for reply, _, _ in WRONG), good) as server:
        stage = stage_of(server, batch_size=5)
        made = list(stage([sample(number) for number in range(len(WRONG) + 2)]))
    assert [item.key for item in made] == ["0000", f"{len(WRONG) + 1:04d}"]
    assert stage.left_out.bad == len(WRONG) == len(stage.left_out.skipped)
    for number, (line, (_, reason, told)) in enumerate(zip(stage.left_out.skipped, WRONG, strict=True), start=1):
        assert line.startswith(f"sample {number:04d}: scene p{number}: graph: ")
        assert told in line
        assert stage.left_out.counts[f"graphs failed: {reason}"] >= 1
    failed = sum(count for what, count in stage.left_out.counts.items() if what.startswith("graphs failed"))
    assert failed == len(WRONG)
    assert "3 failed (cut answer: 1, declined: 1, status 500: 1)" in stage.report(stage.left_out)[0]


def test_code_fences_are_cut_off():
    with chat_server(says(f"Here you are:\n```json\n{json.dumps(GRAPH, indent=1)}\n```")) as server:
        (made,) = stage_of(server)([sample(1)])
    assert len(made.scene.objects) == 3


def test_a_shard_that_is_made_again_asks_nothing_and_is_the_same(tmp_path):
    samples = [sample(number) for number in range(5)]
    with chat_server(otherwise=lambda body: answers()) as server:
        one, two = (stage_of(server, cache=str(tmp_path), batch_size=size) for size in (2, 3))
        first = list(one(samples))
        asked = len(server.bodies)
        second = list(two(samples))
        assert len(server.bodies) == asked == 5
    assert first == second
    assert one.left_out.tallies == two.left_out.tallies
    assert one.settings() == two.settings()
    assert two.model.account.cached == 5


def test_what_a_graph_replaces_and_what_is_too_small_are_counted():
    old = {"objects": (SceneObject(phrase="thing", box=(0, 0, 0.5, 0.5)),)}
    with chat_server(otherwise=lambda body: answers()) as server:
        stage = stage_of(server)
        (made,) = stage([sample(1, **old)])
        assert stage.left_out.counts["objects replaced"] == 1
        assert all(item.box is None for item in made.scene.objects)
        few = stage_of(server, min_relations=4)
        assert not list(few([sample(1)]))
    assert few.left_out.counts == {"graphs with fewer relations than min_relations": 1}
    assert few.left_out.bad == 0
    given = frozenset({"image", "caption", "boxes", "scores"})
    assert stage.provides(given) == {"image", "caption", "phrases", "attributes", "relations"}


def test_a_sample_without_picture_is_told_and_not_asked_about():
    bare = Sample(key="0002", scene=Scene(id="p2"), members={"latent.npy": b""})
    with pytest.raises(ShardError):
        bare.picture()
    with chat_server(otherwise=lambda body: answers()) as server:
        stage = stage_of(server)
        assert [item.key for item in stage([sample(1), bare, sample(3)])] == ["0001", "0003"]
        assert len(server.bodies) == 2
    assert stage.left_out.skipped[0].startswith("sample 0002: scene p2: ")


def test_an_endpoint_that_refuses_the_key_ends_the_stage():
    with chat_server(otherwise=lambda body: refuses(401)) as server, pytest.raises(PartMissing, match="status 401"):
        list(stage_of(server)([sample(1)]))


@pytest.mark.parametrize(("setting", "value"), [("min_relations", -1), ("batch_size", 0)])
def test_wrong_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"stage.{setting}={value}"):
        Graphs(model=RecordedAnswers(), prompt=PROMPT, **{setting: value})
