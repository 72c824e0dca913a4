"""Values with bootstrap intervals, and the part that metrics over scenes share."""

import math

import numpy as np
import pytest

from metrics.base import SceneMetric, Value, bootstrap_interval
from scenes.scene import Scene, SceneObject


class Redness(SceneMetric):
    """Mean red channel; scenes without a caption do not count for the second column."""

    name = "redness"
    columns = ("red", "captioned")

    def score(self, image, scene):
        red = image[..., 0].mean() / 255
        return {"red": red, "captioned": red if scene.caption else None}


def scenes(count):
    item = SceneObject(phrase="thing", box=(0.0, 0.0, 0.5, 0.5))
    return [Scene(id=f"s{i}", caption="" if i % 2 else "a thing", objects=(item,)) for i in range(count)]


def images(count):
    return np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, -1).repeat(4, 1).repeat(5, 2) * 20


def test_interval_is_that_of_the_normal_approximation_for_many_values():
    values = np.random.default_rng(3).normal(5, 2, 4000)
    value = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(4000)
    assert value.mean == pytest.approx(values.mean())
    assert value.low == pytest.approx(value.mean - half, abs=0.01)
    assert value.high == pytest.approx(value.mean + half, abs=0.01)
    assert value.count == 4000


def test_interval_covers_at_about_its_level():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        value = bootstrap_interval(generator.random(60) < 0.3, resamples=400, seed=trial)
        covered += value.low <= 0.3 <= value.high
    assert 0.89 <= covered / 200 <= 0.99


def test_intervals_are_reproducible_and_depend_on_seed_and_level():
    values = np.random.default_rng(1).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_blocks_do_not_change_what_is_drawn(monkeypatch):
    values = np.random.default_rng(1).random(30)
    whole = bootstrap_interval(values, resamples=100)
    monkeypatch.setattr("metrics.base._BLOCK", 30 * 7)
    assert bootstrap_interval(values, resamples=100) == whole


def test_scenes_that_do_not_count_are_left_out():
    value = bootstrap_interval([1.0, None, 0.0, math.nan])
    assert (value.mean, value.count) == (0.5, 2)
    nothing = bootstrap_interval([None])
    assert nothing.count == 0
    assert all(math.isnan(x) for x in (nothing.mean, nothing.low, nothing.high))
    assert bootstrap_interval([0.25]) == Value(mean=0.25, low=0.25, high=0.25, count=1)


@pytest.mark.parametrize(("setting", "value"), [("resamples", 0), ("level", 1.0), ("level", 0.0)])
def test_impossible_intervals_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=setting):
        bootstrap_interval([1.0], **{setting: value})


def test_value_prints_with_its_interval_and_count():
    assert str(Value(mean=0.5, low=0.25, high=0.75, count=8)) == "0.500 [0.250, 0.750] (n=8)"


def test_batches_of_any_size_give_the_same_rows():
    metric = Redness()
    whole = metric.measure(images(7), scenes(7))
    parts = [
        row
        for begin, end in ((0, 3), (3, 4), (4, 7))
        for row in metric.measure(images(7)[begin:end], scenes(7)[begin:end])
    ]
    assert whole == parts
    assert [row["scene"] for row in whole] == [f"s{number}" for number in range(7)]


def test_each_column_counts_its_own_scenes():
    metric = Redness()
    values = metric.compute(metric.measure(images(5), scenes(5)))
    assert (values["red"].count, values["captioned"].count) == (5, 3)
    assert values["red"].mean == pytest.approx(40 / 255)
    assert metric.compute([])["red"].count == 0


def test_pictures_that_could_not_be_scored_are_counted():
    metric = Redness()
    rows = [*metric.measure(images(3), scenes(3)), {"scene": "s3", "failure": "no answer"}]
    value = metric.compute(rows)["red"]
    assert (value.count, value.failed) == (3, 1)


def test_pictures_of_several_sizes_are_scored():
    rows = Redness().measure([images(1)[0], images(2)[1][:2, :1]], scenes(2))
    assert [row["scene"] for row in rows] == ["s0", "s1"]


@pytest.mark.parametrize("wrong", [images(3).astype(np.float32), images(3)[..., :2], images(3)[0], images(2)])
def test_wrong_pictures_are_refused(wrong):
    with pytest.raises(ValueError, match="images: "):
        Redness().measure(wrong, scenes(3))
