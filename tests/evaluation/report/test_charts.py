"""Charts put values where they belong, and take whatever training and metrics give."""

import math
import re
from xml.etree import ElementTree

import pytest

from evaluation.report.charts import MOST_POINTS, curve_chart, interval_chart, ticks


def value(mean, low, high):
    return {"mean": mean, "low": low, "high": high, "count": 10}


def parsed(html):
    return ElementTree.fromstring(f"<div>{html}</div>")


def paths(html, kind):
    return [path.get("d") for path in parsed(html).iter("path") if path.get("class") == kind]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 0.32), (-3, 17), (0, 12345), (1e-9, 2e-9), (0, 3e-13), (5, 5), (0, 0), (-2, -2)]
)
def test_ticks_span_the_values_in_round_steps(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert 2 <= len(marks) <= 9
    steps = [after - before for before, after in zip(marks[:-1], marks[1:], strict=True)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)
    assert float(f"{steps[0] / 10 ** math.floor(math.log10(steps[0] * 1.001)):.3f}") in (1, 2, 2.5, 5)


def test_interval_chart_places_means_and_intervals():
    values = {
        "with_scene": {"layout_iou": value(0.5, 0.4, 0.6)},
        "floor": {"layout_iou": value(0.0, 0, 0)},
        "ceiling": {"layout_iou": value(1.0, 1, 1)},
    }
    chart = parsed(interval_chart(values))
    assert chart.find(".//circle").get("cx") == "50.00%"  # the middle of an axis from 0 to 1
    whisker = next(line for line in chart.iter("line") if line.get("class") == "whisker")
    assert (whisker.get("x1"), whisker.get("x2")) == ("40.30%", "59.70%")
    assert (chart.find(".//rect").get("x"), chart.find(".//rect").get("width")) == ("1.50%", "97.00%")
    assert chart.find(".//svg").get("aria-label") == "Layout IoU: with the scene 0.500, ceiling 1.000, floor 0.000"


def test_metrics_of_another_size_get_an_axis_of_their_own():
    values = {
        "with_scene": {
            "layout_iou": value(0.5, 0.4, 0.6),
            "fid": value(21, 20, 22),
            "ap": value(0.3, 0.2, 0.4),
        }
    }
    groups = [group for group in parsed(interval_chart(values)) if group.get("class") == "intervals"]
    assert [len(group.findall("svg")) for group in groups] == [2, 1]


def test_intervals_without_ends_or_mean():
    values = {"with_scene": {"a": value(0.5, None, None), "b": value(None, None, None)}}
    chart = parsed(interval_chart(values))
    assert len(list(chart.iter("circle"))) == 1
    assert interval_chart({}) == ""


def test_curve_keeps_order_and_the_last_of_a_step():
    points = [(20, 0.0), (0, 1.0), (10, 0.9), (10, 0.5)]
    assert paths(curve_chart("score", points), "line") == ["M0.00 0.00L50.00 50.00L100.00 100.00"]


def test_curve_counts_what_is_not_finite():
    chart = curve_chart("loss", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 0.5)])
    assert "2 values that are not finite are left out" in chart
    assert "nan" not in chart.lower()


@pytest.mark.parametrize("points", [[], [(0, math.nan)]])
def test_curve_without_values_says_so(points):
    assert "no values" in curve_chart("loss", points)


@pytest.mark.parametrize("points", [[(0, 0.0)], [(7, 3.0)], [(0, 0.5), (5, 0.5)], [(0, -1e9), (1, 1e9)], [(3, 1e-7)]])
def test_curve_of_few_or_odd_points(points):
    parsed(curve_chart("loss", points))
    assert len(paths(curve_chart("loss", points), "dots")) == 1


def test_a_long_rough_curve_is_smoothed_and_thinned_but_keeps_spikes():
    points = [(step, 0.5 + 0.1 * (-1) ** step) for step in range(20_000)]
    points[7_777] = (7_777, 3.0)
    chart = curve_chart("loss", points)
    (raw,), (line,) = paths(chart, "raw"), paths(chart, "line")
    assert raw.count("L") < MOST_POINTS
    assert min(float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", raw)) == 0  # the spike is the top of the axis
    assert re.search(r"running mean 0\.(5|49)\d* at step", chart)
    assert len(chart) < 40_000
    assert line != raw


def test_a_smooth_curve_is_left_as_it_is():
    chart = curve_chart("learning_rate", [(step, min(step, 100) * 1e-6) for step in range(1000)])
    assert paths(chart, "raw") == []
    assert "0.0001 at step 999" in chart


def test_a_falling_loss_gets_a_log_axis():
    falling = [(0, 1.0), (1, 0.1), (2, 0.01)]
    chart = curve_chart("loss", falling)
    assert "log scale" in chart
    assert paths(chart, "line") == ["M0.00 0.00L50.00 50.00L100.00 100.00"]
    assert "log scale" not in curve_chart("layout_iou", falling)
    assert "log scale" not in curve_chart("loss", [*falling, (3, 0.0)])


def test_levels_are_drawn_and_named():
    chart = curve_chart("layout_iou", [(0, 0.1), (10, 0.8)], levels={"ceiling": 1.0, "floor": 0.0})
    assert paths(chart, "level") == ["M0 0.00H100", "M0 100.00H100"]
    assert "ceiling 1.000" in chart
