"""IoUs of scene graphs as a judge sees them: LAION-SG's script on its own example, and whatever a judge may answer."""

import json
import math

import numpy as np
import pytest

from labelling.endpoint import Endpoint, RetryPolicy
from labelling.vision_language import NoAnswer, RecordedAnswers, picture_hash, text_hash
from metrics.base import NotAvailable
from metrics.sg_iou import OpenSgIou, SgIou, asked_of, folded, lists_of, set_iou
from scenes.scene import Relation, Scene, SceneObject
from tests.chat_server import chat_server, refuses, says

# The example of LAION-SG's released script: a house in the desert.
HOUSE = [
    ("house", "near", "water"),
    ("house", "made_of", "stone"),
    ("mountain", "behind", "house"),
    ("rock", "near", "water"),
    ("bush", "around", "house"),
]
PROMPT = "Entities: {entities}. Predicates: {predicates}."
SIZE = (6, 9)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


def scene(triples=HOUSE, name="house"):
    nouns = list(dict.fromkeys(noun for subject, _, other in triples for noun in (subject, other)))
    objects = [SceneObject(phrase=f"tall {noun}", label=noun, attributes=("tall",)) for noun in nouns]
    relations = [Relation(subject=nouns.index(s), predicate=p, object=nouns.index(o)) for s, p, o in triples]
    # an object in no relation is not asked for
    return Scene(id=name, objects=(*objects, SceneObject(phrase="blue sky", label="sky")), relations=tuple(relations))


def picture(number=0):
    return np.full((*SIZE, 3), number, np.uint8)


def graph(triples, objects, predicates):
    return json.dumps({"scene_graph": triples, "object_list": objects, "predicate_list": predicates})


def truth(of):
    triples, entities, predicates = asked_of(of)
    return graph([list(triple) for triple in triples], entities, predicates)


def judged(text, matching="exact", of=None):
    metric = SgIou(model=RecordedAnswers(), prompt=PROMPT, matching=matching)
    return tuple(metric.ious(of or scene(), text).values())


def test_a_graph_against_itself_is_1():
    assert judged(truth(scene())) == (1.0, 1.0, 1.0)
    assert judged(truth(scene()), "folded") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # two of five triples, one that is wrong: 2 of 6; four of six objects; three of four predicates
        (
            graph(
                [HOUSE[0], HOUSE[2], ("water", "near", "house")],
                ["house", "water", "mountain", "stone"],
                ["near", "behind", "made_of"],
            ),
            (2 / 6, 4 / 6, 3 / 4),
        ),
        # what is said twice counts once, and what is in no list counts against the picture
        (
            graph([*HOUSE, HOUSE[0], ("house", "under", "sky")], ["house", "house", "sky"], ["near", "under"]),
            (5 / 6, 1 / 7, 1 / 5),
        ),
        # the lists are read as they stand: entities are not gathered from the triples
        (graph(HOUSE, [], []), (1.0, 0.0, 0.0)),
        (json.dumps({"scene_graph": HOUSE}), (1.0, 0.0, 0.0)),
        # texts are compared as they are
        (graph([("House", "near", "water")], ["House"], ["made of"]), (0.0, 0.0, 0.0)),
        (graph([], [], []), (0.0, 0.0, 0.0)),
        (f"```json\n{graph(HOUSE[:1], ['house'], ['near'])}\n```", (1 / 5, 1 / 6, 1 / 4)),
    ],
)
def test_the_published_measure_of_the_published_example(text, expected):
    assert judged(text) == pytest.approx(expected)


def test_folded_texts_match_without_case_article_and_hyphens():
    assert folded("  The Old_stone-house ") == "old stone house"
    assert folded("an") == "an"
    assert folded("another") == "another"
    text = graph([("A House", "Near", "the water")], ["House", "house", "WATER"], ["made of"])
    assert judged(text, "folded") == pytest.approx((1 / 5, 2 / 6, 1 / 4))


def test_what_a_scene_asks_for():
    twice = Scene(
        id="two dogs",
        objects=[SceneObject(phrase="red dog", label="dog"), SceneObject(phrase="blue dog", label="dog")]
        + [SceneObject(phrase="old cat")],
        relations=[
            Relation(subject=0, predicate="near", object=2),
            Relation(subject=1, predicate="near", object=2),
        ],
    )
    assert asked_of(twice) == ([("dog", "near", "old cat")] * 2, ["dog", "old cat"], ["near"])
    assert judged(graph([["dog", "near", "old cat"]], ["dog", "old cat"], ["near"]), of=twice) == (1.0, 1.0, 1.0)


def test_empty_sets():
    assert set_iou(frozenset(), frozenset()) is None
    assert set_iou(frozenset("a"), frozenset()) == 0
    assert set_iou(frozenset(), frozenset("a")) == 0
    assert set_iou(frozenset("ab"), frozenset("bc")) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "text",
    [
        "I am sorry.",
        '{"error": "no picture"}',
        '{"scene_graph": "none"}',
        '{"scene_graph": ["house near water"]}',
        '{"scene_graph": [[1, 2, 3]]}',
        '{"object_list": [{"name": "house"}]}',
        '{"predicate_list": [null]}',
    ],
)
def test_other_answers_cannot_be_read(text):
    with pytest.raises(NoAnswer, match="the answer is") as caught:
        lists_of(text)
    assert caught.value.reason == "unparsable answer"


def metric_of(server, kind=SgIou, prompt=PROMPT, **settings):
    model = Endpoint(model="judge", base_url=server.url, patience=RetryPolicy(attempts=1, concurrent=2), **settings)
    return kind(model=model, prompt=prompt).to("cpu")


def test_the_judge_sees_the_lists_of_its_own_scene():
    with chat_server(says(truth(scene()))) as server:
        (row,) = metric_of(server).measure([picture()], [scene()])
        prompt = server.bodies[0]["messages"][0]["content"][0]["text"]
    assert prompt == (
        'Entities: ["house", "water", "stone", "mountain", "rock", "bush"]. '
        'Predicates: ["near", "made_of", "behind", "around"].'
    )
    assert row == {
        "scene": "house",
        "sg_iou": 1.0,
        "entity_iou": 1.0,
        "relation_iou": 1.0,
        "answer": truth(scene()),
        "tokens": [100, len(truth(scene()).split())],
        "judge": "judge-2024-08-06",
    }


def test_lists_are_written_as_the_published_script_writes_them():
    metric = SgIou(model=RecordedAnswers(), prompt="From {entities} by {predicates}.", lists="python")
    asked = metric.question(picture(), scene(HOUSE[:1])).prompt
    assert asked == "From ['house', 'water'] by ['near']."
    assert metric.settings() != SgIou(model=RecordedAnswers(), prompt=metric.prompt).settings()


def test_failures_are_counted_and_scenes_without_relations_are_not_asked_about():
    scenes = [scene(name=name) for name in ("right", "refused", "gone", "prose")]
    bare = Scene(id="bare", objects=[SceneObject(phrase="sky")])
    replies = (says(truth(scene())), says(None, refusal="no"), refuses(400), says("A house by the water."))
    with chat_server(*replies) as server:
        metric = metric_of(server)
        rows = []
        for number, item in enumerate([*scenes, bare]):
            rows += metric.measure([picture(number)], [item])
        assert len(server.bodies) == 4
    assert [row["scene"] for row in rows] == ["right", "refused", "gone", "prose", "bare"]
    assert ["failure" in row for row in rows] == [False, True, True, True, False]
    assert rows[3]["answer"] == "A house by the water."
    assert json.loads(json.dumps(rows)) == rows
    values = metric.compute(rows)
    for column in metric.columns:
        assert (values[column].mean, values[column].count, values[column].failed) == (1.0, 1, 3)
    assert math.isnan(metric.compute(rows[1:])["sg_iou"].mean)
    assert metric.score(picture(4), bare)["sg_iou"] is None


def test_rows_do_not_depend_on_batches_and_are_paid_for_once(tmp_path):
    scenes = [scene(HOUSE[: count + 1], name=f"s{count}") for count in range(5)]
    pictures = [picture(number) for number in range(5)]

    def judge(body):
        asked = body["messages"][0]["content"][0]["text"]
        return says(graph([HOUSE[0]], ["house", "water"], ["near"]) if "behind" in asked else truth(scene()))

    with chat_server(otherwise=judge) as server:
        whole = metric_of(server, cache=str(tmp_path)).measure(pictures, scenes)
        asked = len(server.bodies)
        again = metric_of(server, cache=str(tmp_path))
        parts = [again.measure([image], [item])[0] for image, item in zip(pictures, scenes, strict=True)]
        assert len(server.bodies) == asked == 5
    assert whole == parts
    assert len({row["sg_iou"] for row in whole}) > 2


def test_open_lists_do_not_tell_what_was_asked_for():
    answer = graph([["The House", "Made of", "stone"]], ["a house", "Stone"], ["made of"])
    with chat_server(otherwise=lambda body: says(answer)) as server:
        (row,) = metric_of(server, OpenSgIou, "What do you see?").measure([picture()], [scene()])
        assert server.bodies[0]["messages"][0]["content"][0]["text"] == "What do you see?"
    assert [row[column] for column in OpenSgIou.columns] == pytest.approx([1 / 5, 2 / 6, 1 / 4])
    assert not set(OpenSgIou.columns) & set(SgIou.columns)


def test_a_recorded_judge_needs_no_endpoint(tmp_path):
    metric = SgIou(model=RecordedAnswers(), prompt=PROMPT)
    question = metric.question(picture(), scene())
    record = {"picture": picture_hash(picture()), "prompt": text_hash(question.prompt), "answer": truth(scene())}
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(record))
    metric = SgIou(model=RecordedAnswers(path=str(path)), prompt=PROMPT).to("cpu")
    rows = metric.measure([picture(), picture(1)], [scene(), scene()])
    assert rows[0]["sg_iou"] == 1
    assert "has no answer" in rows[1]["failure"]


def test_a_judge_that_cannot_be_asked_is_not_available():
    with pytest.raises(NotAvailable, match=r"metric.sg_iou.model: base_url: where is judge\?"):
        SgIou(model=Endpoint(model="judge"), prompt=PROMPT).to("cpu")
    for status, told in ((401, "metric.sg_iou.model: judge: status 401: no"), (500, "more than max_failures=0")):
        with (
            chat_server(otherwise=lambda body, status=status: refuses(status)) as server,
            pytest.raises(NotAvailable, match=told),
        ):
            metric_of(server, max_failures=0).measure([picture()], [scene()])


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="metric.sg_iou.matching=fuzzy"):
        SgIou(model=RecordedAnswers(), prompt=PROMPT, matching="fuzzy")
    with pytest.raises(ValueError, match="metric.sg_iou.prompt: has no {predicates}"):
        SgIou(model=RecordedAnswers(), prompt="{entities}")
    with pytest.raises(ValueError, match="images: "):
        SgIou(model=RecordedAnswers(), prompt=PROMPT).measure([picture()], [])


def test_settings_name_judge_prompt_and_matching():
    one = SgIou(model=Endpoint(model="judge"), prompt=PROMPT)
    assert one.settings()["judge"]["model"] == "judge"
    assert one.settings() != SgIou(model=Endpoint(model="judge"), prompt=PROMPT + " ").settings()
    assert one.settings() != SgIou(model=Endpoint(model="judge"), prompt=PROMPT, matching="folded").settings()
    json.dumps(one.settings())
