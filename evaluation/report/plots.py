"""Plots of one quantity over another as inline SVG: a score over the number of objects, over a setting, FID over CLIP.

Colours come from the page's style sheet by class, `s0` to `s7`. Charts of intervals and of training are in `charts.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from evaluation.report.charts import ticks
from evaluation.report.wording import short

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 40
COLOURS = 8


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place in a plot.

    Attributes:
        x: Across.
        y: Up.
        low: Lower end of an interval of y; None draws none.
        high: Upper end of it.
        said: Words that show where a pointer rests.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What one figure shows.

    Attributes:
        title: Its name.
        x: Name of what is across.
        y: Name of what is up.
        series: Points by name, each joined in its order.
        note: A sentence under the plot.
        unit: Whether values that lie between 0 and 1 are drawn over all of that range.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    note: str = ""
    unit: bool = False


def plot_section(plots: Sequence[Plot], *, name: str, heading: str) -> str:
    """A section with figures; nothing where no plot has a point.

    Args:
        plots: What to draw.
        name: Id of the section.
        heading: Its heading.

    Returns:
        HTML.
    """
    drawn = "".join(figure(plot) for plot in plots if any(plot.series.values()))
    return f'<section id="{name}"><h2>{escape(heading)}</h2><div class="plots">{drawn}</div></section>' if drawn else ""


def figure(plot: Plot) -> str:
    """A plot as HTML.

    Args:
        plot: What to draw; at least one point.

    Returns:
        A figure with its legend.
    """
    points = [point for series in plot.series.values() for point in series]
    xs = ticks(min(p.x for p in points), max(p.x for p in points))
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    ys = [0.0, 0.25, 0.5, 0.75, 1.0] if plot.unit and min(ends) >= 0 and max(ends) <= 1 else ticks(min(ends), max(ends))
    place = _Places(xs, ys)
    marks = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place.up(y):.1f}" y2="{place.up(y):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{place.up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>'
        for y in ys
    )
    marks += "".join(
        f'<text x="{place.across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(x)}</text>' for x in xs
    )
    names = (
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(plot.x)}</text>"
    )
    lines = "".join(_series(series, number, place) for number, series in enumerate(plot.series.values()))
    legend = "".join(
        f'<li class="s{number % COLOURS}"><span>{escape(name)}</span></li>' for number, name in enumerate(plot.series)
    )
    shown = f"<ul>{legend}</ul>" if len(plot.series) > 1 else ""
    note = f'<p class="note">{escape(plot.note)}</p>' if plot.note else ""
    return (
        f'<figure class="figure card"><figcaption><b>{escape(plot.title)}</b></figcaption>'
        f'<svg role="img" aria-label="{escape(plot.title)}: {escape(plot.y)} over {escape(plot.x)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{marks}{names}{lines}</svg>{shown}{note}</figure>'
    )


@dataclass(frozen=True)
class _Places:
    """Where values lie in the drawing, px."""

    xs: list[float]
    ys: list[float]

    def across(self, x: float) -> float:
        return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * (x - self.xs[0]) / (self.xs[-1] - self.xs[0])

    def up(self, y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - self.ys[0]) / (self.ys[-1] - self.ys[0])


def _series(points: Sequence[Point], number: int, place: _Places) -> str:
    at = [(place.across(point.x), place.up(point.y)) for point in points]
    path = f'<path class="path" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in at)}"/>' if len(at) > 1 else ""
    whiskers = "".join(
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{place.up(point.low):.1f}" y2="{place.up(point.high):.1f}"/>'
        for point, (x, _) in zip(points, at, strict=True)
        if point.low is not None and point.high is not None
    )
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(point.said or f"{point.x:g}: {point.y:.4g}")}</title></circle>'
        for point, (x, y) in zip(points, at, strict=True)
    )
    return f'<g class="s{number % COLOURS}">{path}{whiskers}{dots}</g>'
