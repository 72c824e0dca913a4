"""Draws the layout score of several runs over their training steps into one SVG, for the documentation.

    python -m scripts.layout_curves OUT.svg LABEL=RUN[,RUN…] [LABEL=RUN[,RUN…] …]

Runs behind one label share a colour: the seeds of one experiment.
"""

import sys
from html import escape
from pathlib import Path

from evaluation.report.charts import ticks
from loggers.metrics_csv import read_metrics

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 170, 16, 40
COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706")
METRIC = "layout/layout_iou"


def points(run: str, metric: str = METRIC) -> list[tuple[float, float]]:
    """(step, value) of a run's metric, in order of steps.

    Raises:
        ValueError: the run has not logged it.
    """
    found = sorted((step, value) for step, name, value in read_metrics(Path(run) / "metrics.csv") if name == metric)
    if not found:
        raise ValueError(f"{run}: metrics.csv holds no {metric}; give a run that validated with callback=layout_score")
    return found


def svg(curves: dict[str, list[list[tuple[float, float]]]]) -> str:
    """The picture of the curves by label; the y axis runs from 0 to 1."""
    last = max(step for runs in curves.values() for run in runs for step, _ in run)
    steps = ticks(0, last)

    def x(step: float) -> float:
        return LEFT + step / steps[-1] * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for mark in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for step in steps:
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">training steps</text>')
    for place, (label, runs) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        for run in runs:
            line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in run)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        height = TOP + 12 + 18 * place
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {height - 4}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 36}" y="{height}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main(out: str, *curves: str) -> None:
    """Writes the picture of `LABEL=RUN,RUN` curves.

    Raises:
        ValueError: an argument without a label, or no curve.
    """
    if not curves or not all("=" in curve for curve in curves):
        raise ValueError(f"{' '.join(curves) or 'no curve'}: give each curve as LABEL=RUN or LABEL=RUN,RUN")
    named = dict(curve.split("=", 1) for curve in curves)
    Path(out).write_text(svg({label: [points(run) for run in runs.split(",")] for label, runs in named.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
