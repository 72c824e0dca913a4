"""The published filters, applied to scenes made for their edges; sources read by them agree."""

import pytest

from datamodules.sources.coco import Coco
from scenes.filters import FILTERS
from scenes.scene import Relation, Scene, SceneObject


def thing(area=0.04, label="dog", crowd=False):
    return SceneObject(phrase=label, label=label, box=(0.0, 0.0, area**0.5, area**0.5), is_crowd=crowd)


def scene(*objects, relations=()):
    return Scene(id="s", objects=objects, relations=relations)


@pytest.mark.parametrize(("name", "fewest", "most"), [("lama", 3, 8), ("creatilayout", 2, 10), ("rich_context", 1, 30)])
def test_the_number_of_objects_decides(name, fewest, most):
    chosen = [count for count in range(33) if FILTERS[name](scene(*[thing()] * count)) is not None]
    assert chosen == list(range(fewest, most + 1))
    assert FILTERS[name].name == name


def test_small_objects_and_crowds_go_before_objects_are_counted():
    left = FILTERS["lama"](
        scene(
            thing(0.019),
            thing(),
            thing(0.9, crowd=True),
            thing(),
            thing(0.0201),
            relations=[Relation(subject=1, predicate="near", object=3)],
        )
    )
    assert left is not None
    assert len(left.objects) == 3
    assert left.relations == (Relation(subject=0, predicate="near", object=1),)
    assert FILTERS["lama"](scene(thing(0.019), thing(), thing())) is None


def test_persons_are_counted_before_the_small_ones_go():
    persons = [thing(0.001, "person")] * 3
    filter_ = FILTERS["creatilayout"]
    assert filter_(scene(thing(), thing(), *persons)) is not None
    assert filter_(scene(thing(), thing(), *persons, thing(0.001, "person"))) is None
    assert filter_(scene(thing(), thing(), *persons, thing(0.5, "person", crowd=True))) is not None
    assert FILTERS["lama"](scene(thing(), thing(), thing(), *persons, thing(0.001, "person"))) is not None


def test_publishers_numbers():
    assert FILTERS["lama"].scenes == {"val2017": 3097}
    assert FILTERS["creatilayout"].scenes == {"train2017": 61002, "val2017": 2565}


@pytest.mark.parametrize("name", list(FILTERS))
def test_a_source_read_by_a_filter_gives_what_the_filter_gives_of_all(name, samples):
    root = str(samples / "coco")
    rule = FILTERS[name]
    read = {one.id: one for one, _ in Coco(root=root, split="train2017", filter=name)}
    whole = [one for one, _ in Coco(root=root, split="train2017", stuff=rule.stuff, crowd=True)]
    kept = {one.id: left for one in whole if (left := rule(one)) is not None}
    assert 0 < len(kept) <= len(whole)
    assert {key: [o.box for o in one.objects] for key, one in kept.items()} == {
        key: [o.box for o in one.objects] for key, one in read.items()
    }
