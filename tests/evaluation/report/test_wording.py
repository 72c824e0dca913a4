"""What the report says in words: names, numbers, and the verdict."""

import pytest

from evaluation.report.wording import (
    digits,
    in_order,
    lower_is_better,
    number,
    reading,
    short,
    title,
    two_digits,
    verdict,
)


def value(mean, low=None, high=None, count=100):
    return {"mean": mean, "low": low, "high": high, "count": count}


def arms(**means):
    return {arm: {"layout_iou": value(mean, mean - 0.01, mean + 0.01)} for arm, mean in means.items()}


def test_verdict_in_one_line():
    values = arms(with_scene=0.861, without_scene=0.1, ceiling=0.99, floor=0.09)
    assert verdict(values) == "Layout IoU 0.86 with the scene, 0.10 without; ceiling 0.99, floor 0.09"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (arms(with_scene=0.5), "Layout IoU 0.50 with the scene"),
        (arms(with_scene=0.5, floor=0.1), "Layout IoU 0.50 with the scene; floor 0.10"),
        (arms(ceiling=0.9), "Layout IoU ceiling 0.90"),
        (arms(real=0.99, ceiling=0.99, floor=0.1), "Layout IoU 0.99 of the real pictures; ceiling 0.99, floor 0.10"),
        (arms(pictures=0.7, floor=0.1), "Layout IoU 0.70 of the given pictures; floor 0.10"),
        ({"with_scene": {"fid": value(21.04)}}, "FID 21.04 with the scene"),
        ({"with_scene": {"layout_iou": value(None)}}, "No metric gave a value."),
        ({"with_scene": {}}, "No metric gave a value."),
        ({}, "No metric gave a value."),
    ],
)
def test_verdict_of_what_there_is(values, said):
    assert verdict(values) == said


def test_layout_comes_first():
    values = {"with_scene": {"colour": value(0.2), "layout_iou": value(0.5)}, "floor": {"a": value(0.1)}}
    assert verdict(values).startswith("Layout IoU 0.50")
    assert in_order(values) == ["layout_iou", "a", "colour"]


def test_reading_places_the_result_between_floor_and_ceiling():
    values = arms(with_scene=0.8, without_scene=0.2, ceiling=1.0, floor=0.0)
    assert reading(values) == "That is 80 % of the way from floor to ceiling."
    assert reading(arms(pictures=0.3, ceiling=1.0, floor=0.2)) == "That is 12 % of the way from floor to ceiling."


def test_reading_warns_where_the_scene_makes_no_difference():
    assert "makes no difference that shows" in reading(arms(with_scene=0.5, without_scene=0.485))
    assert reading(arms(with_scene=0.5, without_scene=0.47)) == ""
    assert reading({}) == ""


def test_numbers():
    assert number(0.12345) == "0.123"
    assert number(12000) == "12\N{NARROW NO-BREAK SPACE}000"
    assert number(None) == number(float("nan")) == "–"
    assert [short(step) for step in (0, 500, 12000, 2_500_000)] == ["0", "500", "12k", "2.5M"]
    assert [digits([size, None]) for size in (0.001, 0.5, 9.9, 21, 400)] == [5, 3, 3, 2, 1]
    assert digits([]) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [(0.996, "0.996"), (1.0, "1.00"), (0.004, "0.004"), (0.0, "0.00"), (0.86, "0.86"), (1, "1.00")],
)
def test_a_near_miss_is_not_rounded_to_a_hit(given, said):
    assert two_digits(given) == said


def test_names():
    assert title("layout_iou") == "Layout IoU"
    assert title("val/ap50") == "Val AP50"
    assert lower_is_better("fid")
    assert lower_is_better("train/loss")
    assert not lower_is_better("layout_iou")
