"""Rows on disk come back as they were, torn ones not at all."""

import math

import numpy as np
import pytest

from evaluation.rows import RowStore, batches_of, gathered, row_keys, scene_marks, unmeasured
from scenes.scene import Scene, SceneObject


class Pictures:
    def __init__(self, stamps):
        self.stamps = stamps

    def stamp(self, place):
        return self.stamps[place]

    def read(self, place):
        return np.zeros((2, 2, 3), np.uint8)


def test_rows_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    row = {
        "scene": "ä/1",
        "feature": rng.standard_normal((3, 5)).astype(np.float16),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 4), np.int64),
        "score": np.float32(0.1),
        "nan": math.nan,
        "boxes": [[1, 2.5], {"label": None}],
    }
    RowStore(tmp_path / "rows").append({"k": row})
    (found,) = RowStore(tmp_path / "rows").read().values()
    for name in ("feature", "mask", "empty"):
        assert found[name].dtype == row[name].dtype
        assert np.array_equal(found[name], row[name])
        assert found[name].flags.writeable
    assert found["score"] == float(np.float32(0.1))
    assert math.isnan(found["nan"])
    assert (found["scene"], found["boxes"]) == (row["scene"], row["boxes"])


def test_processes_write_files_of_their_own_and_a_torn_line_is_no_row(tmp_path):
    one, other = RowStore(tmp_path, writer="0"), RowStore(tmp_path, writer="0")
    one.append({"a": {"x": 1}})
    other.append({"b": {"x": 2}})
    one.append({"c": {"x": 3}})
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert RowStore(tmp_path).keys() == {"a", "b", "c"}
    torn = next(path for path in tmp_path.glob("*.jsonl") if '"c"' in path.read_text())
    torn.write_bytes(torn.read_bytes()[:-4])
    assert RowStore(tmp_path).keys() == {"a", "b"}
    rows, missing = gathered(RowStore(tmp_path), ["b", "c", None, "a"])
    assert (rows, missing) == ([{"x": 2}, {"x": 1}], 2)


def test_a_key_is_of_scene_and_pictures_alone():
    scenes = [Scene(id="a"), Scene(id="b")]
    first = row_keys(scene_marks(scenes), [Pictures(["x", "y"])])
    assert len({*first}) == 2
    assert row_keys(scene_marks(scenes), [Pictures(["x", "z"])])[0] == first[0]
    assert row_keys(scene_marks(scenes), [Pictures(["x", "z"])])[1] != first[1]
    other = [Scene(id="a", objects=(SceneObject(phrase="dog"),)), Scene(id="b")]
    assert row_keys(scene_marks(other), [Pictures(["x", "y"])])[0] != first[0]
    assert row_keys(scene_marks(scenes), [Pictures(["x", "y"]), Pictures(["q", None])]) == [
        row_keys(scene_marks(scenes), [Pictures(["x", "y"]), Pictures(["q", "r"])])[0],
        None,
    ]


def test_a_batch_with_a_missing_row_is_measured_whole(tmp_path):
    store = RowStore(tmp_path)
    store.append({key: {} for key in "abde"})
    batches = batches_of(7, 3)
    assert batches == [range(3), range(3, 6), range(6, 7)]
    assert unmeasured(store, [*"abcdef", None], batches) == [range(3), range(3, 6)]
    assert unmeasured(store, [*"abadeb", None], batches) == []


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row: set cannot be kept"):
        RowStore(tmp_path).append({"a": {"x": {1, 2}}})
