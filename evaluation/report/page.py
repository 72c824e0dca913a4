"""What an evaluation leaves behind: `metrics.json` for programs and `report.html` for people.

The report is one file that loads nothing: style, script, charts and pictures are inside it, and its own content
policy forbids the rest, any other script included. What is measured, and on which pictures, is the caller's to decide; the
parts of the page are in `sections.py`, `charts.py`, `plots.py` and `pictures.py`.
"""

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluation.report.charts import Points
from evaluation.report.images import Choice, PictureRow, choose, picture_section
from evaluation.report.plots import Plot, plot_section
from evaluation.report.sections import head, not_measured, protocol, published, run_name, scores, training
from evaluation.report.wording import ARMS, PRIMARY, primary_metric
from files.atomic import write_atomically

__all__ = ["Choice", "PictureRow", "choose", "write_metrics", "write_report"]

KEYS = ("values", "protocol", "versions", "weights_sha256", "step", "samples_seen", "run")
VALUE = ("mean", "low", "high", "count", "failed")
PROTOCOL = (
    "name",
    "split",
    "scenes",
    "sampler",
    "steps",
    "guidance",
    "grounding_fraction",
    "seeds",
    "filters",
)
STYLE = Path(__file__).with_name("report.css")
SCRIPT = Path(__file__).with_name("report.js")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{script}'"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Writes the scores with all that is needed to make them again.

    Args:
        path: Usually `metrics.json`; the file is there whole or not at all.
        metrics: "values" {arm: {metric: Value or {mean, low, high, count}}}, "protocol", "versions",
            "weights_sha256", "step", "samples_seen", "run"; more keys are kept behind these. Numbers that are
            not finite are written as null.

    Raises:
        ValueError: A key is missing, an arm is unknown, or something does not fit into JSON.
    """
    text = json.dumps(_checked(metrics), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    *,
    pictures: Sequence[PictureRow] = (),
    curves: Mapping[str, Points] | None = None,
    plots: Sequence[Plot] = (),
) -> None:
    """Writes the report as one HTML file; the same arguments give the same bytes.

    Args:
        path: Usually `report.html`; the file is there whole or not at all.
        metrics: As `write_metrics` takes them. Of the other keys "command" is shown as the way to make this again, "published"
            {system: {"source", "values": {metric: number}}} beside the scores, with "implementations"
            {metric: {"implementation", "beside"}} of values that are not the metric of that name here, "not_measured"
            {metric: reason} and "failures" {arm: {metric: {"count", "first"}}} under them.
        pictures: One row a scene, of all scenes or of some.
        curves: (step, value) by name, such as `loss` and `layout_iou`.
        plots: What is drawn beside the scores.

    Raises:
        ValueError: As `write_metrics`; or two rows are of one scene.
    """
    kept = _checked(metrics)
    values = kept["values"]
    sections = (
        head(kept),
        scores(values),
        published(values, kept.get("published") or {}, kept.get("implementations") or {}),
        plot_section(plots, name="complexity", heading="By complexity"),
        not_measured(kept.get("not_measured") or {}, kept.get("failures") or {}),
        training(values, curves or {}),
        picture_section(pictures, metric=primary_metric(values) or PRIMARY, of=kept["protocol"].get("scenes")),
        protocol(kept),
    )
    write_page(path, f"{run_name(kept['run'])} – Scenograph evaluation", "\n".join(sections))


def write_page(path: str | Path, title: str, body: str) -> None:
    """Writes a page with the report's style and script.

    Args:
        path: The file; it is there whole or not at all.
        title: Text of its title.
        body: HTML.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = PAGE.format(
        policy=POLICY.format(script=f"sha256-{digest}"),
        name=escape(title),
        style=STYLE.read_text(encoding="utf-8"),
        body=body,
        script=script,
    )
    write_atomically(path, page.encode())


def _checked(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics in plain JSON values and a stable order."""
    missing = [key for key in KEYS if key not in metrics]
    if missing:
        raise ValueError(f"metrics: {missing[0]!r} is missing; give all of {', '.join(KEYS)}")
    unknown = [arm for arm in metrics["values"] if arm not in ARMS]
    if unknown:
        raise ValueError(f"metrics: values: {unknown[0]!r} is no arm; give some of {', '.join(ARMS)}")
    kept = {key: _plain(metrics[key], where=f"metrics: {key}") for key in _leading(KEYS, metrics)}
    kept["values"] = {
        arm: {name: _value(value, where=f"metrics: values: {arm}.{name}") for name, value in values.items()}
        for arm, values in ((arm, kept["values"][arm]) for arm in _leading(ARMS, kept["values"]))
    }
    kept["protocol"] = {key: kept["protocol"][key] for key in _leading(PROTOCOL, kept["protocol"])}
    return kept


def _value(value: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(VALUE[:4]) <= value.keys():
        raise ValueError(f"{where}: {value!r} is no value; give {', '.join(VALUE)}")
    return {key: value[key] for key in _leading(VALUE, value)}


def _leading(first: Iterable[str], keys: Iterable[str]) -> list[str]:
    """The keys, those of `first` in that order and then the others by name."""
    return [key for key in first if key in keys] + sorted(set(keys).difference(first))


def _plain(value: Any, *, where: str) -> Any:
    """A JSON value with sorted keys; NumPy's and PyTorch's numbers become Python's, infinite ones None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key], where=f"{where}.{key}") for key in sorted(value, key=str)}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item, where=f"{where}[{place}]") for place, item in enumerate(value)]
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "shape", None) == ():
        return _plain(item(), where=where)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"{where}: {type(value).__name__} does not fit into JSON; give plain values")
