"""The stage `filter`: what goes is counted under its filter, and relations follow the objects."""

import pytest

from datamodules.shards import ShardSet, write_shards
from datamodules.sources.shapes import Shapes
from preparation.filters import Filter, ObjectLimits, SceneLimits
from preparation.runner import run_stage
from preparation.stage import Sample
from scenes.scene import Frame, Relation, Scene, SceneObject


def scene(name, *objects, caption="two words", relations=(), frame=None):
    return Scene(id=name, caption=caption, objects=objects, relations=relations, frame=frame)


def thing(label, side=0.5, **more):
    return SceneObject(phrase=f"a {label}", label=label, box=(0.0, 0.0, side, side), **more)


def filter_of(**settings):
    """The stage, its limits by their own names."""
    of_objects = {name: value for name, value in settings.items() if hasattr(ObjectLimits, name)}
    of_scenes = {name: value for name, value in settings.items() if name not in of_objects}
    return Filter(objects=ObjectLimits(**of_objects), scenes=SceneLimits(**of_scenes))


def passed(scenes, **settings):
    stage = filter_of(**settings)
    samples = [Sample(key=item.id, scene=item, members={"png": b""}) for item in scenes]
    return {sample.key: sample.scene for sample in stage(samples)}, dict(stage.left_out.counts)


@pytest.mark.parametrize(
    ("settings", "kept", "counted"),
    [
        ({"min_area": 0.05}, ["dog"], {"boxes under min_area": 2}),
        ({"max_area": 0.05}, ["cat", "nothing"], {"boxes over max_area": 1}),
        ({"min_score": 0.5}, ["dog", "nothing"], {"boxes under min_score": 1}),
        ({"labels": ["cat"]}, ["cat"], {"boxes of other labels": 2}),
        ({"without_labels": ["cat", "dog"]}, ["nothing"], {"boxes of without_labels": 2}),
        ({"crowds": False}, ["cat", "dog"], {"boxes of crowds": 1}),
        ({"crowds": False, "min_area": 0.05}, ["dog"], {"boxes of crowds": 1, "boxes under min_area": 1}),
    ],
)
def test_objects_that_are_not_wanted_go_with_their_relations(settings, kept, counted):
    objects = (thing("cat", 0.1, score=0.4), thing("dog"), thing("nothing", 0.2, is_crowd=True))
    relations = tuple(Relation(subject=a, predicate=f"{a}{b}", object=b) for a, b in ((0, 1), (1, 2), (2, 0)))
    scenes, told = passed([scene("a", *objects, relations=relations)], **settings)
    assert told == counted
    assert [item.label for item in scenes["a"].objects] == kept
    names = [item.label for item in objects]
    expected = {(names[r.subject], names[r.object]) for r in relations} & {(a, b) for a in kept for b in kept}
    assert {(kept[r.subject], kept[r.object]) for r in scenes["a"].relations} == expected


@pytest.mark.parametrize(
    ("settings", "kept", "counted"),
    [
        ({"min_objects": 1}, ["one", "three"], {"scenes under min_objects": 1}),
        ({"max_objects": 2}, ["none", "one"], {"scenes over max_objects": 1}),
        ({"most_of_label": {"cat": 1}}, ["none", "one"], {"scenes over most_of_label": 1}),
        ({"min_relations": 1}, ["three"], {"scenes under min_relations": 2}),
        ({"min_caption_words": 2}, ["none", "three"], {"scenes under min_caption_words": 1}),
        ({"max_caption_words": 2}, ["none", "one"], {"scenes over max_caption_words": 1}),
        ({"min_side": 30}, ["one", "three"], {"scenes under min_side": 1}),
        # what an object filter leaves is what scenes are judged by; objects of a scene that goes are not counted
        ({"labels": ["cat"], "min_objects": 2}, ["three"], {"boxes of other labels": 1, "scenes under min_objects": 2}),
    ],
)
def test_scenes_that_are_not_wanted_go(settings, kept, counted):
    on = (Relation(subject=0, predicate="on", object=1),)
    scenes = [
        scene("none", frame=Frame(original=(40, 20))),
        scene("one", thing("dog"), caption="word", frame=Frame(original=(40, 30))),
        scene("three", thing("cat"), SceneObject(phrase="cat"), thing("dog"), caption="a few words more", relations=on),
    ]
    left, told = passed(scenes, **settings)
    assert (list(left), told) == (kept, counted)


def test_filtered_shards_tell_what_went(tmp_path):
    shards = write_shards(Shapes(count=40), tmp_path / "in", shard_size=10)
    run_stage(filter_of(min_objects=2, min_area=0.1), shards, tmp_path / "out")
    before, after = ShardSet(shards), ShardSet(tmp_path / "out")
    expected, small, few = [], 0, 0
    for item in map(before.scene, range(40)):
        left, gone = item.without_small(0.1)
        if len(left.objects) < 2:
            few += 1
        else:
            expected.append(left)
            small += gone
    assert [after.scene(n) for n in range(len(after))] == expected
    assert after.index["left_out"] == {"boxes under min_area": small, "scenes under min_objects": few}
    assert small
    assert few
    assert after.index["counts"]["objects"] == sum(len(item.objects) for item in expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "stage: "),
        ({"min_area": 2.0}, "stage.objects.min_area=2.0"),
        ({"min_objects": -1}, "stage.scenes.min_objects=-1"),
        ({"min_objects": 4, "max_objects": 3}, "stage.scenes.min_objects=4.*stage.scenes.max_objects=3"),
    ],
)
def test_filters_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        filter_of(**settings)


def test_a_filter_requires_what_it_looks_at():
    assert filter_of(min_area=0.1, max_caption_words=3).requires == {"boxes", "caption"}
    assert filter_of(min_relations=1).settings() == {"min_relations": 1}
