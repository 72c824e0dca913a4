"""COCO-MIG's and OverLayBench's numbers on cases worked out by hand."""

import colorsys
import math

import numpy as np
import pytest

from labelling.parts import Detections, Detector, Segmenter
from metrics.colours import COLOURS, hsv, share_of_colour
from metrics.layout import CocoMig, OverLayBench, best_overlaps, overlap_ious, paired
from scenes.scene import Scene, SceneObject

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


class Recorded(Detector):
    """An open detector that finds what was recorded for a picture's first pixel, of what it is asked for."""

    def __init__(self, found):
        self.found, self.asked = found, []

    def settings(self):
        return {"model": "recorded"}

    def to(self, device):
        return self

    def __call__(self, pictures, asked=None):
        self.asked.append([list(one) for one in asked])
        return [
            found(*(item for item in self.found[int(picture[0, 0, 0])] if item[2] in words))
            for picture, words in zip(pictures, asked, strict=True)
        ]


class Boxes(Segmenter):
    """Masks that fill their boxes."""

    def settings(self):
        return {"model": "boxes"}

    def to(self, device):
        return self

    def __call__(self, pictures, boxes):
        masks = []
        for picture, each in zip(pictures, boxes, strict=True):
            height, width = picture.shape[:2]
            mask = np.zeros((len(each), height, width), bool)
            for place, (x0, y0, x1, y1) in enumerate(each):
                mask[place, round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
            masks.append(mask)
        return masks


def found(*items):
    return Detections(
        boxes=np.array([box for box, _, _ in items], np.float32).reshape(-1, 4),
        scores=np.array([score for _, score, _ in items], np.float32),
        labels=tuple(label for _, _, label in items),
    )


def scene(number, *items):
    objects = tuple(
        SceneObject(phrase=phrase, label=label, attributes=attributes, box=box)
        for box, phrase, label, attributes in items
    )
    return Scene(id=f"s{number}", objects=objects)


def picture(number=0, colours=((255, 0, 0), (0, 0, 255))):
    """Left half, right half; the first pixel tells the recorded detector which picture it is."""
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, :10], image[:, 10:] = colours
    image[0, 0] = number
    return image


RED_DOG, BLUE_CAT = (LEFT, "red dog", "dog", ("red",)), (RIGHT, "blue cat", "cat", ("blue",))


def test_mig_counts_place_and_colour_over_objects():
    scenes = [scene(0, RED_DOG, BLUE_CAT), scene(1, RED_DOG, BLUE_CAT), scene(2, RED_DOG)]
    detector = Recorded(
        [
            [(LEFT, 0.9, "dog"), (RIGHT, 0.8, "cat")],
            [(LEFT, 0.9, "dog"), ((0.5, 0.0, 1.0, 0.6), 0.8, "cat"), ((0.5, 0.0, 1.0, 0.2), 0.99, "cat")],
            [((0.0, 0.0, 0.5, 0.4), 0.9, "dog")],
        ]
    )
    images = [picture(0), picture(1, ((255, 0, 0), (0, 255, 0))), picture(2)]
    metric = CocoMig(detector=detector, segmenter=Boxes(), resamples=50)
    rows = metric.measure(images, scenes)
    assert rows[0]["miou"] == pytest.approx([1, 1])
    assert rows[1]["iou"] == pytest.approx([1, 0.6])
    assert rows[1]["miou"] == pytest.approx([1, 0])  # in place, but green
    assert rows[2]["miou"] == pytest.approx([0.4])  # out of place: keeps its IoU, and its colour is not looked at
    assert math.isnan(rows[2]["colour"][0])
    values = metric.compute(rows)
    assert values["coco_mig_miou"].mean == pytest.approx((1 + 1 + 1 + 0 + 0.4) / 5)
    assert values["coco_mig_success"].mean == pytest.approx(3 / 5)
    assert values["coco_mig_placed"].mean == pytest.approx(4 / 5)
    assert values["coco_mig_scene_success"].mean == pytest.approx(1 / 3)
    assert values["coco_mig_miou_1"].mean == pytest.approx(0.4)
    assert values["coco_mig_success_2"].mean == pytest.approx(3 / 4)
    assert (values["coco_mig_miou"].count, values["coco_mig_miou_2"].count) == (3, 2)
    assert values["coco_mig_miou"].low <= values["coco_mig_miou"].mean <= values["coco_mig_miou"].high


def test_mig_asks_for_each_label_alone_and_without_its_colour():
    detector = Recorded([[(LEFT, 0.9, "dog")]])
    unlabelled = (RIGHT, "blue cat", "", ())
    metric = CocoMig(detector=detector)
    rows = metric.measure([picture()], [scene(0, RED_DOG, unlabelled, RED_DOG)])
    assert detector.asked == [[["cat"], ["dog"]]]
    assert rows[0]["iou"] == pytest.approx([1, 0, 1])  # one found box may serve two objects
    assert np.isnan(rows[0]["colour"]).all()


def test_overlaybench_pairs_one_to_one_from_the_best_down():
    boxes = np.array([LEFT, (0.0, 0.0, 0.5, 0.8)])
    iou, partners = paired(boxes, ["dog", "dog"], found((LEFT, 0.1, "dog")))
    assert iou == pytest.approx([1, 0])
    assert np.isnan(partners[1]).all()
    both = found(((0.0, 0.0, 0.5, 0.9), 0.9, "dog"), (LEFT, 0.1, "cat"))
    iou, partners = paired(boxes, ["dog", "dog"], both)
    assert iou == pytest.approx([0.9, 0])  # 0.9 before 0.8 / 0.9
    assert partners[0] == pytest.approx([0, 0, 0.5, 0.9])
    assert best_overlaps(boxes, ["dog", "dog"], both) == pytest.approx([0.9, 0.8 / 0.9])


def test_overlaps_are_compared_as_rectangles():
    boxes = np.array([(0.0, 0.0, 0.6, 1.0), (0.4, 0.0, 1.0, 1.0), (0.9, 0.0, 1.0, 1.0)])
    assert overlap_ious(boxes, boxes) == pytest.approx([1, 1])  # (0, 1) and (1, 2); 0 and 2 do not meet
    apart = boxes.copy()
    apart[0, 2] = 0.5  # what the first pair shares is half as wide
    assert overlap_ious(boxes, apart) == pytest.approx([0.5, 1])
    missing = boxes.copy()
    missing[0] = math.nan
    assert overlap_ious(boxes, missing) == pytest.approx([0, 1])
    beside = boxes.copy()
    beside[0, 2] = 0.3
    assert overlap_ious(boxes, beside) == pytest.approx([0, 1])
    assert overlap_ious(boxes, boxes, least=0.17) == pytest.approx([1])
    assert overlap_ious(boxes[:1], boxes[:1]).shape == (0,)


def test_overlaybench_averages_within_scenes_first():
    crossing = (0.4, 0.0, 0.9, 1.0)
    scenes = [
        scene(0, (LEFT, "a dog", "dog", ()), (crossing, "a cat", "cat", ())),
        scene(1, *[(LEFT, "a dog", "dog", ())] * 1),
        scene(2),
    ]
    detector = Recorded([[(LEFT, 0.9, "dog")], [(LEFT, 0.9, "dog")], []])
    metric = OverLayBench(detector=detector, resamples=20)
    rows = metric.measure([picture(number) for number in range(3)], scenes)
    assert detector.asked == [[["cat", "dog"], ["dog"]]]
    values = metric.compute([*rows, {"scene": "s3", "failure": "no picture"}])
    assert values["overlay_miou"].mean == pytest.approx((0.5 + 1) / 2)
    assert values["overlay_success"].mean == pytest.approx(2 / 3)
    assert (values["overlay_o_miou"].mean, values["overlay_o_miou"].count) == (0, 1)
    assert (values["overlay_miou"].count, values["overlay_miou"].failed) == (2, 1)


@pytest.mark.parametrize("kind", [CocoMig, OverLayBench])
def test_empty_sets_are_defined_and_batches_change_nothing(kind):
    metric = kind(detector=Recorded([[(LEFT, 0.9, "dog")], [], [(RIGHT, 0.9, "dog"), (RIGHT, 0.8, "cat")]]))
    assert all(math.isnan(value.mean) and value.count == 0 for value in metric.compute([]).values())
    scenes = [scene(0, RED_DOG), scene(1, RED_DOG, BLUE_CAT), scene(2, BLUE_CAT)]
    images = [picture(number) for number in range(3)]
    whole = metric.measure(images, scenes)
    for place, row in enumerate(whole):
        np.testing.assert_equal(metric.measure(images[place : place + 1], scenes[place : place + 1])[0], row)


def test_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="metric.overlaybench.overlap=1.0"):
        OverLayBench(detector=Recorded([]), overlap=1.0)
    with pytest.raises(ValueError, match="metric.coco_mig.text=name"):
        CocoMig(detector=Recorded([]), text="name")


def test_hue_saturation_and_value_are_those_of_colorsys_in_whole_numbers():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    got = hsv(image).reshape(-1, 3)
    for pixel, (hue, saturation, value) in zip(image.reshape(-1, 3), got, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        assert min(abs(hue - h * 180), 180 - abs(hue - h * 180)) <= 0.6  # fixed point, as there
        assert (saturation, value) == (pytest.approx(s * 255, abs=0.6), pytest.approx(v * 255, abs=1e-6))


def test_colours_are_told_apart():
    known = {
        "red": (220, 20, 20),
        "blue": (30, 60, 220),
        "green": (30, 200, 40),
        "yellow": (240, 230, 20),
        "black": (10, 10, 10),
        "white": (250, 250, 250),
        "brown": (140, 80, 30),
    }
    mask = np.ones((4, 6), bool)
    assert set(known) == set(COLOURS)
    for name, rgb in known.items():
        image = np.full((4, 6, 3), rgb, np.uint8)
        assert [colour for colour in COLOURS if share_of_colour(image, mask, colour) == 1] == [name]
        image[:, :3] = (127, 127, 127)
        assert share_of_colour(image, mask, name) == 0.5
    assert share_of_colour(image, ~mask, "red") == 0
