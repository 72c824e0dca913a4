"""AP and AR: known cases, equality with COCO's evaluator on files, resampling, empty sets, batches."""

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datamodules.sources.coco import Coco
from labelling.detectors import OnnxDetector
from labelling.parts import Detections, Detector, PartMissing
from metrics.base import NotAvailable
from metrics.detection import FIGURES, Detection, evaluated, figures_of
from runtime.composition import compose
from scenes.scene import Scene, SceneObject

SHARED = Path(os.environ.get("SCENOGRAPH_SHARED", Path(__file__).parents[3] / "shared"))
LARGE = (0.1, 0.2, 0.6, 0.9)
SMALL = (0.7, 0.1, 0.75, 0.2)


class Recorded(Detector):
    """Detections by the picture's first pixel; with names it is closed, else it finds only what it is asked for."""

    def __init__(self, found, names=None):
        self.found, self._names = found, names
        self.asked = []

    names = property(lambda self: self._names)

    def settings(self):
        return {"model": "recorded"}

    def to(self, device):
        return self

    def __call__(self, pictures, asked=None):
        assert (asked is None) == (self._names is not None)
        self.asked.append(asked)
        return [self.found[int(picture[0, 0, 0])] for picture in pictures]


def found(*items):
    return Detections(
        boxes=np.array([box for box, _, _ in items], np.float32).reshape(-1, 4),
        scores=np.array([score for _, score, _ in items], np.float32),
        labels=tuple(label for _, _, label in items),
    )


def scene(number, *items):
    objects = tuple(
        SceneObject(phrase=f"a {label}", label=label, box=box, is_crowd=crowd) for box, label, crowd in items
    )
    return Scene(id=f"s{number}", objects=objects)


def pictures(count, size=(200, 160)):
    return [np.full((*size, 3), number, np.uint8) for number in range(count)]


def values(scenes, detections, *, names=("cat", "dog"), **settings):
    metric = Detection(detector=Recorded(detections, names), resamples=20, **settings)
    return metric.compute(metric.measure(pictures(len(scenes)), scenes))


def test_perfect_detections_have_an_ap_of_one():
    scenes = [scene(0, (LARGE, "cat", False), (SMALL, "dog", False)), scene(1, (LARGE, "dog", False))]
    perfect = [found((LARGE, 0.9, "cat"), (SMALL, 0.8, "dog")), found((LARGE, 0.7, "dog"))]
    result = values(scenes, perfect)
    for name in ("ap", "ap50", "ap75", "ar", "known", "ap_small"):
        assert (result[name].mean, result[name].low, result[name].high) == pytest.approx((1, 1, 1)), name
        assert result[name].count == 2
    assert result["ap_large"].count == 2
    assert set(result) == {*FIGURES, "known"}


def test_one_false_positive_above_the_right_one_halves_precision():
    scenes = [scene(0, (LARGE, "cat", False))]
    wrong = (0.0, 0.0, 0.05, 0.05)
    assert values(scenes, [found((wrong, 0.9, "cat"), (LARGE, 0.8, "cat"))])["ap"].mean == pytest.approx(0.5)
    assert values(scenes, [found((wrong, 0.7, "cat"), (LARGE, 0.8, "cat"))])["ap"].mean == pytest.approx(1)
    # One of another label costs nothing where no scene asks for that label.
    assert values(scenes, [found((wrong, 0.9, "dog"), (LARGE, 0.8, "cat"))])["ap"].mean == pytest.approx(1)


def test_iou_decides_which_thresholds_count():
    scenes = [scene(0, ((0.0, 0.0, 1.0, 0.64), "cat", False))]
    result = values(scenes, [found(((0.0, 0.0, 1.0, 0.4), 0.9, "cat"))])  # IoU 0.625
    assert (result["ap50"].mean, result["ap75"].mean) == pytest.approx((1, 0))
    assert result["ap"].mean == pytest.approx(0.3)  # .50, .55, .60 of ten
    assert result["ar"].mean == pytest.approx(0.3)


def test_crowds_and_unknown_labels_count_for_nothing():
    crowd = scene(0, (LARGE, "cat", False), (SMALL, "cat", True), (SMALL, "sky-other", False))
    result = values([crowd], [found((LARGE, 0.5, "cat"), (SMALL, 0.9, "cat"))])
    assert result["ap"].mean == pytest.approx(1)
    assert result["known"].mean == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def random_set():
    generator = np.random.default_rng(5)
    scenes, detections = [], []
    for number in range(14):
        items, seen = [], []
        for _ in range(generator.integers(0, 6)):
            corner = generator.random(2) * 0.6
            box = (*corner, *(corner + 0.03 + generator.random(2) * 0.36))
            label = str(generator.choice(["cat", "dog", "tv"]))
            items.append((box, label, bool(generator.random() < 0.1)))
            if generator.random() < 0.8:
                moved = np.clip(np.array(box) + generator.normal(0, 0.012, 4), 0, 1)
                seen.append((tuple(moved), float(generator.random()), label))
        for _ in range(generator.integers(0, 4)):
            corner = generator.random(2) * 0.7
            label = str(generator.choice(["cat", "dog", "tv"]))
            seen.append(((*corner, *(corner + 0.05 + generator.random(2) * 0.2)), float(generator.random()), label))
        scenes.append(scene(number, *items))
        detections.append(found(*seen))
    metric = Detection(detector=Recorded(detections, ("cat", "dog", "tv")), resamples=200)
    return metric, metric.measure(pictures(14, (480, 360)), scenes), scenes


def coco_stats(folder, rows):
    """COCO's summary of rows written to JSON files as its users write them."""
    labels = sorted({label for row in rows for label in row["labels"]})
    truth, results = [], []
    for number, row in enumerate(rows):
        for box, label, crowd in zip(row["boxes"].astype(float), row["labels"], row["crowd"], strict=True):
            x, y, w, h = *box[:2], *(box[2:] - box[:2])
            entry = {"id": len(truth) + 1, "image_id": number, "category_id": labels.index(label) + 1}
            truth.append(entry | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(crowd)})
        for box, label, score in zip(row["found"].astype(float), row["found_labels"], row["scores"], strict=True):
            x, y, w, h = *box[:2], *(box[2:] - box[:2])
            place = {"image_id": number, "category_id": labels.index(label) + 1}
            results.append(place | {"bbox": [x, y, w, h], "score": float(score)})
    content = {
        "images": [{"id": number} for number in range(len(rows))],
        "categories": [{"id": number, "name": label} for number, label in enumerate(labels, 1)],
        "annotations": truth,
    }
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))
    gt = COCO(folder / "truth.json")
    evaluator = COCOeval(gt, gt.loadRes(str(folder / "results.json")), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    stats = evaluator.stats[[0, 1, 2, 3, 4, 5, 8, 9, 10, 11]]
    return np.where(stats < 0, math.nan, stats)  # it says -1 where nothing is asked for


def test_figures_are_those_of_coco_on_json_files(random_set, tmp_path, capsys):
    metric, rows, _ = random_set
    result = metric.compute(rows)
    assert capsys.readouterr().out == ""
    assert [result[name].mean for name in FIGURES] == pytest.approx(coco_stats(tmp_path, rows), abs=1e-12, nan_ok=True)
    assert 0.1 < result["ap"].mean < 0.9


def test_a_resample_has_the_figures_of_a_set_with_its_scenes_repeated(random_set, tmp_path):
    _, rows, _ = random_set
    times = np.random.default_rng(1).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=3).astype(float)
    times[0] = 1
    drawn = figures_of(evaluated(rows), times)
    for number, row_times in enumerate(times.astype(int)):
        repeated = [row for row, count in zip(rows, row_times, strict=True) for _ in range(count)]
        expected = coco_stats(tmp_path, repeated)
        got = [drawn[name][number] for name in FIGURES]
        assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_interval_holds_the_figure_and_depends_on_the_seed_alone(random_set):
    metric, rows, _ = random_set
    one, two = metric.compute(rows)["ap"], metric.compute(rows)["ap"]
    assert one == two
    assert one.low < one.mean < one.high
    other = Detection(detector=metric.detector, resamples=200, seed=1).compute(rows)["ap"]
    assert (other.mean, other.low != one.low) == (one.mean, True)


def test_batches_of_any_size_give_the_same_rows(random_set):
    metric, rows, scenes = random_set
    images = pictures(14, (480, 360))
    parts = [row for i in range(0, 14, 3) for row in metric.measure(images[i : i + 3], scenes[i : i + 3])]
    assert [row["scene"] for row in rows] == [one.id for one in scenes]
    for one, other in zip(rows, parts, strict=True):
        np.testing.assert_equal(one, other)


def test_pictures_of_several_seeds_are_drawn_with_their_scene(random_set):
    metric, rows, _ = random_set
    one, twice = metric.compute(rows), metric.compute([*rows, *rows])
    for name in ("ap", "ap50", "ar"):
        assert (twice[name].mean, twice[name].count) == (pytest.approx(one[name].mean, abs=0.01), one[name].count)
        assert twice[name].high - twice[name].low == pytest.approx(one[name].high - one[name].low, abs=0.02)


def test_empty_sets_are_defined():
    nothing = values([], [])
    assert all(math.isnan(value.mean) and value.count == 0 for value in nothing.values())
    unasked = values([scene(0)], [found((LARGE, 0.9, "cat"))])
    assert (unasked["ap"].count, unasked["known"].count) == (0, 0)
    unfound = values([scene(0, (LARGE, "cat", False))], [found()])
    assert (unfound["ap"].mean, unfound["ar"].mean, unfound["ap"].high) == (0, 0, 0)
    assert unfound["ap_small"].count == 0


def test_failed_pictures_are_counted():
    metric = Detection(detector=Recorded([found((LARGE, 0.9, "cat"))], ("cat",)), resamples=5)
    rows = metric.measure(pictures(1), [scene(0, (LARGE, "cat", False))])
    result = metric.compute([*rows, {"scene": "s1", "failure": "no picture"}])
    assert (result["ap"].mean, result["ap"].count, result["ap"].failed) == (pytest.approx(1), 1, 1)


def test_an_open_detector_is_asked_for_each_scenes_words():
    detector = Recorded([found((LARGE, 0.9, "cat")), found(), found((LARGE, 0.9, "a dog"))])
    metric = Detection(detector=detector, resamples=5)
    scenes = [scene(0, (LARGE, "Cat", False), (SMALL, "cat", False)), scene(1), scene(2, (LARGE, "dog", False))]
    metric.measure(pictures(3), scenes)
    Detection(detector=detector, text="phrase").measure(pictures(3), scenes)
    assert detector.asked == [[["cat"], ["dog"]], [["a cat"], ["a dog"]]]


def test_wrong_settings_and_missing_models_are_named(tmp_path):
    with pytest.raises(ValueError, match="metric.detection.text=caption"):
        Detection(detector=Recorded([], ("cat",)), text="caption")
    metric = Detection(detector=OnnxDetector(file=str(tmp_path / "none.onnx"), form="yolox"))
    with pytest.raises(NotAvailable, match=r"metric\.detection\.detector\.file=.*none\.onnx: not there"):
        metric.to("cpu")
    assert issubclass(PartMissing, ValueError)


@pytest.mark.parametrize("detector", ["rtdetr", "detr", "yolox", "yolov8"])
def test_the_configuration_builds_it_with_any_closed_detector(detector):
    from hydra.utils import instantiate

    overrides = ["run=none", "metric=[detection]", f"detector@metric.detection.detector={detector}"]
    if detector.startswith("yolo"):
        overrides.append("metric.detection.detector.file=weights.onnx")
    cfg = compose("evaluate", overrides)
    metric = instantiate(cfg.metric.detection, _convert_="all")
    assert isinstance(metric, Detection)
    assert json.loads(json.dumps(metric.settings())) == metric.settings()


@pytest.mark.skipif(
    not (SHARED / "models" / "yolox_nano.onnx").exists(),
    reason="the photographs and the detector are not here; set SCENOGRAPH_SHARED to their folder",
)
def test_a_real_detector_finds_what_real_photographs_show():
    source = Coco(root=str(SHARED / "samples" / "coco"), split="train2017", crowd=True)
    samples = [(one, np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB"))) for one, picture in source]
    detector = OnnxDetector(file=str(SHARED / "models" / "yolox_nano.onnx"), form="yolox", threshold=0.01)
    metric = Detection(detector=detector, resamples=20).to("cpu")
    scenes, images = zip(*samples, strict=True)
    rows = metric.measure(images, scenes)
    result = metric.compute(rows)
    assert result["ap"].mean > 0.2  # the bound of real pictures
    assert 0.35 < result["ap50"].mean < 0.6
    assert result["ap"].low < result["ap"].mean < result["ap"].high
    assert result["known"].mean == 1
    keys = ("found", "scores", "found_labels")
    others = [row | {key: other[key] for key in keys} for row, other in zip(rows[:20], rows[1:21], strict=True)]
    assert metric.compute(others)["ap"].mean < 0.05
