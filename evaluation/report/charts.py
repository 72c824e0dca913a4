"""Charts as inline SVG for the report: intervals of metrics, and curves over training steps.

They stretch with the page: dots and intervals are placed in percent, curves in a view box whose lines keep
their width, and all text is the page's own. Colours come from the page's style sheet by class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import Any

from evaluation.report.wording import ARMS, Values, digits, ends, in_order, number, short, title, words

Points = Sequence[tuple[float, float]]
MOST_POINTS = 400  # a chart is not wider than this many pixels by much
SMOOTHED_FROM = 80
ROUGH = 4.0  # a curve whose ups and downs add to this many times its range is read better smoothed
DOTTED_TO = 60
LOG_FROM = 20.0  # ratio of the largest to the smallest loss from which a linear axis hides the end of training
LANES = {"with_scene": 15, "real": 15, "pictures": 15, "without_scene": 33}


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers that span [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def interval_chart(values: Values) -> str:
    """One row a metric: the arms' means with their intervals, over a band from floor to ceiling.

    Metrics between 0 and 1 share an axis; every other one gets its own.
    """
    names = in_order(values)
    shared = [name for name in names if _unit(ends(values, name))]
    groups = [(shared, [0.0, 0.25, 0.5, 0.75, 1.0])] if shared else []
    for name in names:
        known = ends(values, name)
        if known and name not in shared:
            groups.append(([name], ticks(min(known), max(known))))
    return "".join(_interval_group(values, group, marks) for group, marks in groups)


def _interval_group(values: Values, names: list[str], marks: list[float]) -> str:
    rows = "".join(
        f'<div class="interval-name">{escape(title(name))}</div>{_interval_row(values, name, marks)}' for name in names
    )
    axis = "".join(
        f'<span style="left:{_across(mark, marks):.2f}%">{escape(_tick(mark, marks))}</span>' for mark in marks
    )
    return f'<div class="intervals">{rows}<div></div><div class="interval-axis" aria-hidden="true">{axis}</div></div>'


def _interval_row(values: Values, name: str, marks: list[float]) -> str:
    at = {arm: values.get(arm, {}).get(name, {}) for arm in ARMS}
    shown = {arm: value for arm, value in at.items() if value.get("mean") is not None}
    decimals = digits(ends(values, name))
    said = ", ".join(f"{ARMS[arm]} {number(value['mean'], digits=decimals)}" for arm, value in shown.items())
    parts = [_upright("grid", _across(mark, marks), 0, 48) for mark in marks]
    frame = {arm: _across(shown[arm]["mean"], marks) for arm in ("floor", "ceiling") if arm in shown}
    if len(frame) == 2:
        low, high = sorted(frame.values())
        parts.append(f'<rect class="band" x="{low:.2f}%" width="{high - low:.2f}%" y="3" height="42"/>')
    for arm, x in frame.items():
        parts.append(_upright(arm, x, 3, 45, said=f"{ARMS[arm]} {number(shown[arm]['mean'], digits=decimals)}"))
    parts += [_dot(arm, shown[arm], marks, decimals) for arm in LANES if arm in shown]
    label = escape(f"{title(name)}: {said}")
    return f'<svg class="interval" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _upright(kind: str, x: float, top: int, bottom: int, *, said: str = "") -> str:
    inside = f"<title>{escape(said)}</title>" if said else ""
    return f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{top}" y2="{bottom}">{inside}</line>'


def _dot(arm: str, value: dict[str, Any], marks: list[float], decimals: int) -> str:
    mean, *interval = (value[end] if value[end] is not None else value["mean"] for end in ("mean", "low", "high"))
    x, low, high = (_across(place, marks) for place in (mean, *interval))
    y = LANES[arm]
    said = [number(place, digits=decimals) for place in (mean, *interval)]
    beside = f'x="{high:.2f}%" dx="11"' if high < 82 else f'x="{low:.2f}%" dx="-11" text-anchor="end"'
    return (
        f'<g class="{arm}"><title>{escape(ARMS[arm])} {said[0]} ({said[1]} to {said[2]})</title>'
        f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>'
        f'<circle cx="{x:.2f}%" cy="{y}" r="5.5"/><text {beside} y="{y + 4}">{said[0]}</text></g>'
    )


def curve_chart(name: str, points: Points, *, levels: dict[str, float] | None = None) -> str:
    """A quantity over training steps, with its running mean where it is many values and rough.

    Args:
        name: What is drawn, such as `loss` or `val/layout_iou`.
        points: (step, value); of several at one step the last counts; values that are not finite are left out
            and counted under the chart.
        levels: What to compare with, by name, such as ceiling and floor.

    Returns:
        A figure in HTML.
    """
    last_at = dict(points)
    finite = {step: last_at[step] for step in sorted(last_at) if math.isfinite(last_at[step])}
    lost = len(last_at) - len(finite)
    note = f'<p class="note">{lost} values that are not finite are left out.</p>' if lost else ""
    if not finite:
        return _figure(title(name), "no values", note)
    steps, drawn = list(finite), list(finite.values())
    axes = _axes(name, steps, [*drawn, *(levels or {}).values()])
    smooth = _running_mean(drawn)
    last = smooth[-1] if smooth else drawn[-1]
    aside = f"{'running mean ' if smooth else ''}{short(last)} at step {number(int(steps[-1]))}"
    if axes.log:
        aside += ", log scale"
    return _figure(title(name), aside, _plot(axes, steps, drawn, smooth, levels or {}) + note)


@dataclass(frozen=True)
class _Axes:
    """Where steps and values lie: percent from the left and from the bottom."""

    span: tuple[float, float]
    xs: list[float]
    ys: list[float]
    log: bool

    def across(self, step: float) -> float:
        return 100 * (step - self.span[0]) / (self.span[1] - self.span[0])

    def up(self, value: float) -> float:
        low, high = self.ys[0], self.ys[-1]
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return 100 * min(1.0, max(0.0, (value - low) / (high - low)))


def _axes(name: str, steps: list[float], values: list[float]) -> _Axes:
    span = (min(0, steps[0]), max(steps[-1], steps[0] + 1))
    xs = [x for x in ticks(*span, about=4) if span[0] <= x <= span[1]]
    log = "loss" in words(name.lower()) and min(values) > 0 and max(values) / min(values) > LOG_FROM
    return _Axes(span, xs, _log_ticks(min(values), max(values)) if log else _value_ticks(values), log)


def _figure(name: str, aside: str, inside: str) -> str:
    caption = f"<b>{escape(name)}</b><span>{escape(aside)}</span>"
    return f'<figure class="curve card"><figcaption>{caption}</figcaption>{inside}</figure>'


def _plot(axes: _Axes, steps: list[float], drawn: list[float], smooth: list[float], levels: dict[str, float]) -> str:
    def line(kind: str, values: list[float]) -> str:
        places = _thin([(axes.across(x), 100 - axes.up(y)) for x, y in zip(steps, values, strict=True)])
        return f'<path class="{kind}" d="M{"L".join(f"{x:.2f} {y:.2f}" for x, y in places)}"/>'

    lines = [f'<path class="grid" d="M0 {100 - axes.up(y):.2f}H100"/>' for y in axes.ys]
    lines += [f'<path class="level" d="M0 {100 - axes.up(level):.2f}H100"/>' for level in levels.values()]
    lines += [line("raw", drawn), line("line", smooth)] if smooth else [line("line", drawn)]
    if len(drawn) <= DOTTED_TO:  # a line of no length with round ends is a dot that does not stretch
        dots = "".join(f"M{axes.across(x):.2f} {100 - axes.up(y):.2f}h0" for x, y in zip(steps, drawn, strict=True))
        lines.append(f'<path class="dots" d="{dots}"/>')
    names = "".join(
        f'<span style="bottom:{axes.up(level):.2f}%">{escape(key)} {number(level)}</span>'
        for key, level in levels.items()
    )
    y_marks = "".join(f'<span style="bottom:{axes.up(y):.2f}%">{_tick(y, axes.ys)}</span>' for y in axes.ys)
    x_marks = "".join(f'<span style="left:{axes.across(x):.2f}%">{short(x)}</span>' for x in axes.xs)
    said = f"{len(drawn)} values from {short(drawn[0])} to {short(drawn[-1])}"
    return (
        f'<div class="plot"><div class="y-axis" aria-hidden="true">{y_marks}</div><div class="area">'
        f'<svg role="img" aria-label="{said}" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f"{''.join(lines)}</svg>{names}</div><div></div>"
        f'<div class="x-axis" aria-hidden="true">{x_marks}</div></div>'
    )


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: of every bucket the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    buckets = MOST_POINTS // 2
    kept = []
    for _, bucket in groupby(enumerate(points), key=lambda item: item[0] * buckets // len(points)):
        inside = [point for _, point in bucket]
        kept += sorted({min(inside, key=lambda point: point[1]), max(inside, key=lambda point: point[1])})
    return kept


def _running_mean(values: list[float]) -> list[float]:
    """A centred running mean over a 25th of the values; nothing where they are few or smooth already."""
    way = sum(abs(after - before) for before, after in pairwise(values))
    if len(values) < SMOOTHED_FROM or way < ROUGH * (max(values) - min(values)):
        return []
    half = max(2, len(values) // 50)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    edges = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def _value_ticks(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    if low >= 0 and 0.3 < high <= 1:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    return ticks(0.0 if 0 <= low < 0.5 * high else low, high)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first < 3 else (1,)
    marks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = [mark for mark in marks if mark <= low] or marks[:1]
    above = [mark for mark in marks if mark >= high] or marks[-1:]
    return [mark for mark in marks if below[-1] <= mark <= above[0]]


def _across(value: float, marks: list[float]) -> float:
    """Place of a value in percent of the width; a little is left free at both ends for the dots."""
    return 1.5 + 97 * min(1.0, max(0.0, (value - marks[0]) / (marks[-1] - marks[0])))


def _tick(mark: float, marks: list[float]) -> str:
    return short(mark) if max(map(abs, marks)) >= 1000 else f"{mark:.4g}"


def _unit(values: list[float]) -> bool:
    return bool(values) and min(values) >= 0 and max(values) <= 1
