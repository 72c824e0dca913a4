"""Which conditions are dropped: the joint rates are the table's, and what is dropped is gone."""

import pytest
import torch

from models.conditioning.drops import ConditionDrops
from models.objectives import draw
from scenes import Scene, SceneBatch, SceneObject

TABLE = {"keep": 0.55, "scene_only": 0.25, "caption_only": 0.15, "none": 0.05}


def scenes(count):
    thing = SceneObject(phrase="red circle", box=(0.1, 0.2, 0.6, 0.9))
    return SceneBatch([Scene(id=str(n), caption=f"caption {n}", objects=(thing,)) for n in range(count)])


def same_scene(count):
    return SceneBatch([scenes(1).scenes[0]] * count)


def kinds(drops, draws):
    """keep, scene_only, caption_only or none of each sample, read off what comes back."""
    batch = same_scene(len(draws))
    left, captions, has_caption = drops(batch, draws)
    assert [bool(caption) for caption in captions] == has_caption.tolist()
    assert [scene.id for scene in left] == [scene.id for scene in batch]
    has_scene = [bool(scene.objects) for scene in left]
    names = {(True, True): "keep", (True, False): "scene_only", (False, True): "caption_only", (False, False): "none"}
    return [names[pair] for pair in zip(has_scene, has_caption.tolist(), strict=True)]


def test_joint_rates_are_the_tables():
    count = 20_000
    found = kinds(ConditionDrops(**TABLE), draw(0, range(count), (1, 1, 1)).keep)
    for name, rate in TABLE.items():
        assert abs(found.count(name) / count - rate) < 4 * (rate * (1 - rate) / count) ** 0.5, name


def test_a_number_decides_by_its_place_in_the_cumulated_table():
    draws = torch.tensor([0.0, 0.549, 0.551, 0.799, 0.801, 0.949, 0.951, 1 - 2**-53], dtype=torch.float64)
    expected = [name for name in TABLE for _ in range(2)]
    assert kinds(ConditionDrops(**TABLE), draws) == expected


@pytest.mark.parametrize("name", TABLE)
def test_a_rate_of_one_is_always_and_of_zero_never(name):
    draws = torch.tensor([0.0, 0.1, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert kinds(ConditionDrops(**{"keep": 0.0, name: 1.0}), draws) == [name] * 4


def test_what_is_kept_is_unchanged_and_what_is_dropped_is_empty():
    batch = scenes(4)
    left, captions, has_caption = ConditionDrops(**TABLE)(batch, torch.tensor([0.1, 0.6, 0.9, 0.99]))
    assert captions == ["caption 0", "", "caption 2", ""]
    assert has_caption.tolist() == [True, False, True, False]
    assert left.scenes[:2] == batch.scenes[:2]
    assert left.scenes[2:] == tuple(scene.without_layout() for scene in batch.scenes[2:])


def test_which_dropped_captions_become_zeros():
    kept = torch.tensor([True, False, True])
    assert ConditionDrops(keep=1.0).zeroed(kept) is None  # the encoding of "" stays
    assert ConditionDrops(keep=1.0, dropped_caption="zeros").zeroed(kept) is kept


def test_a_method_may_have_a_rate_of_its_own():
    drops = ConditionDrops(keep=1.0, methods={"regions": 0.5, "boxes": 0.0})
    draws = torch.tensor([[0.0, 0.49], [0.9, 0.5]])  # columns: boxes, regions
    batch = scenes(2)
    seen = drops.seen(batch, draws)
    assert seen["boxes"].scenes == batch.scenes
    assert seen["regions"].scenes == (batch.scenes[0].without_layout(), batch.scenes[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.9}, r"drops: the rates .* sum to 0.9; make them sum to 1"),
        ({"keep": 0.9, "none": 0.2}, r"drops: the rates .* sum to 1.1"),
        ({"keep": 1.2, "none": -0.2}, "none negative"),
        ({"keep": 1.0, "methods": {"boxes": 1.5}}, "drops.methods.boxes: 1.5 is outside \\[0, 1\\]; give a rate"),
        ({"keep": 1.0, "dropped_caption": "null"}, "drops.dropped_caption: 'null' is unknown; take empty or zeros"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ConditionDrops(**settings)
