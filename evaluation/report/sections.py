"""The sections of the report as HTML: head, scores, published numbers, what was not measured, training, protocol.

They take metrics as `write_metrics` leaves them and escape everything that they show. Charts are drawn in
`charts.py`, the rows of pictures in `pictures.py`.
"""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluation.report.charts import Points, curve_chart, interval_chart
from evaluation.report.wording import (
    ARMS,
    NOTHING,
    SCORED,
    Values,
    digits,
    ends,
    in_order,
    lower_is_better,
    number,
    reading,
    title,
    verdict,
    words,
)


def head(kept: dict[str, Any]) -> str:
    """The run's name, the verdict, and what it rests on."""
    made_with, meaning = kept["protocol"], reading(kept["values"])
    facts = {
        "protocol": made_with.get("name"),
        "split": made_with.get("split"),
        "scenes": made_with.get("scenes"),
        "step": kept["step"],
        "samples seen": kept["samples_seen"],
    }
    shown = "".join(f"<li>{key} <b>{escape(_text(fact))}</b></li>" for key, fact in facts.items() if fact is not None)
    return (
        '<header><p class="eyebrow">Scenograph evaluation</p>'
        f'<h1>{escape(run_name(kept["run"]))}</h1><p class="verdict">{escape(verdict(kept["values"]))}</p>'
        f'<p class="reading">{escape(meaning)}</p><ul class="facts">{shown}</ul></header>'
    )


def scores(values: Values) -> str:
    """All metrics: a chart of intervals, and the table of metrics by arms."""
    names = in_order(values)
    arms = [arm for arm in ARMS if values.get(arm)]
    if not names:
        return '<section id="scores"><h2>Scores</h2><p class="note">No metric was measured.</p></section>'
    heads = "".join(f'<th scope="col" class="{arm}"><i></i>{escape(ARMS[arm])}</th>' for arm in arms)
    legend = "".join(f'<li class="{arm}"><i></i>{escape(ARMS[arm])}</li>' for arm in arms)
    rows = "".join(_row(values, name, arms) for name in names)
    return (
        '<section id="scores"><h2>Scores</h2><p class="note">Means with 95 % bootstrap intervals over scenes '
        "and the number of scenes behind each (n). Ceiling and floor: the best that a metric gives here, and "
        f'what it gives by chance.</p><div class="card"><ul class="legend">{legend}</ul>'
        f'{interval_chart(values)}</div><div class="card scroll"><table><thead><tr>'
        f'<th scope="col">metric</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def published(
    values: Values, systems: Mapping[str, Any], implementations: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """What others have published under this protocol, beside the value here, with where it is from.

    Args:
        values: Those measured here.
        systems: System -> "source" and "values" by metric.
        implementations: Metric -> "implementation", what made the published values, and "beside", the metric here that stands
            beside them; a metric without an entry is the one of that name here.

    Returns:
        The section; nothing where nothing is published.
    """
    if not systems:
        return ""
    arm = next((arm for arm in SCORED if arm in values), None)
    ours = values.get(arm, {}) if arm else {}
    names = list(dict.fromkeys(name for system in systems.values() for name in system.get("values", {})))
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in systems)
    others = implementations or {}
    rows = "".join(_published_row(name, ours, systems, others.get(name)) for name in names)
    sources = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_text(system.get('source')))}</dd>" for name, system in systems.items()
    )
    return (
        '<section id="published"><h2>Published</h2><p class="note">As published, not measured here; other code, weights or '
        f'pictures may stand behind a number of the same name.</p><div class="card scroll"><table><thead><tr>'
        f'<th scope="col">metric</th><th scope="col">here</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<div class="card"><dl>{sources}</dl></div></section>'
    )


def not_measured(reasons: Mapping[str, str], failures: Mapping[str, Any]) -> str:
    """Metrics without a value and pictures without a score, each with the reason."""
    metrics = "".join(f"<dt>{escape(name)}</dt><dd>{escape(reason)}</dd>" for name, reason in reasons.items())
    failed = "".join(
        f"<dt>{escape(name)}, {escape(ARMS.get(arm, arm))}</dt><dd>{number(of_metric['count'])} pictures: "
        f"{escape('; '.join(of_metric['first']))}</dd>"
        for arm, of_arm in failures.items()
        for name, of_metric in of_arm.items()
    )
    parts = [("Not measured", metrics), ("Pictures that could not be scored", failed)]
    shown = "".join(f'<div class="card"><h3>{name}</h3><dl>{said}</dl></div>' for name, said in parts if said)
    return f'<section id="not-measured"><h2>Missing</h2>{shown}</section>' if shown else ""


def training(values: Values, curves: Mapping[str, Points]) -> str:
    """The curves of training; those of a metric with its ceiling and floor."""
    if not curves:
        return ""
    charts = "".join(curve_chart(name, points, levels=_levels(values, name)) for name, points in curves.items())
    return f'<section id="training"><h2>Training</h2><div class="curves">{charts}</div></section>'


def protocol(kept: dict[str, Any]) -> str:
    """Everything that the numbers depend on, and the command that makes them again."""
    weights = {
        "run": kept["run"],
        "sha256": kept["weights_sha256"],
        "step": kept["step"],
        "samples seen": kept["samples_seen"],
    }
    weights |= {key: kept[key] for key in ("checkpoint", "device", "git_commit", "wall_time_s") if key in kept}
    tables = {"Protocol": kept["protocol"], "Weights": weights, "Versions": kept["versions"]}
    shown = "".join(
        f'<div class="card"><h3>{name}</h3><dl>{_definitions(table)}</dl></div>' for name, table in tables.items()
    )
    return (
        f'<section id="protocol"><h2>How it was made</h2><div class="tables">{shown}</div>'
        f'<h3>Make it again</h3><pre class="card"><code>{escape(_command(kept))}</code></pre></section>'
    )


def run_name(run: Any) -> str:
    """The last part of a run's folder."""
    return Path(str(run)).name or str(run)


def _row(values: Values, name: str, arms: Sequence[str]) -> str:
    decimals = digits(ends(values, name))
    better = "<small>lower is better</small>" if lower_is_better(name) else ""
    cells = "".join(f'<td class="{arm}">{_cell(values.get(arm, {}).get(name), decimals)}</td>' for arm in arms)
    return f'<tr><th scope="row">{escape(title(name))}{better}</th>{cells}</tr>'


def _published_row(
    name: str, values: Mapping[str, Any], systems: Mapping[str, Any], other: Mapping[str, str] | None
) -> str:
    beside = name if other is None else other["beside"]
    ours = values.get(beside)
    published = [system.get("values", {}).get(name) for system in systems.values()]
    decimals = digits([value for value in (*published, (ours or {}).get("mean")) if value is not None])
    cells = "".join(
        f"<td>{number(None if value is None else float(value), digits=decimals)}</td>" for value in published
    )
    better = "<small>lower is better</small>" if lower_is_better(name) else ""
    said = "" if other is None else f"<small>published: {escape(other['implementation'])}</small>"
    here = "" if other is None else f"<small>here: {escape(beside)}</small>"
    return f'<tr><th scope="row">{escape(title(name))}{better}{said}</th><td>{_cell(ours, decimals)}{here}</td>{cells}</tr>'


def _cell(value: dict[str, Any] | None, decimals: int) -> str:
    if value is None:
        return f"<b>{NOTHING}</b>"
    mean, low, high = (number(value[end], digits=decimals) for end in ("mean", "low", "high"))
    interval = f"{low} to {high}" if NOTHING not in (low, high) else ""
    behind = f"n = {number(value['count'])}" if value["count"] is not None else ""
    failed = f"{number(value['failed'])} failed" if value.get("failed") else ""
    return f"<b>{mean}</b><small>{', '.join(part for part in (interval, behind, failed) if part)}</small>"


def _levels(values: Values, curve: str) -> dict[str, float]:
    """Ceiling and floor of the metric that a curve shows, also under a longer name (`val/layout_iou`)."""
    found = {}
    for arm in ("ceiling", "floor"):
        for name, value in values.get(arm, {}).items():
            if words(curve)[-len(words(name)) :] == words(name) and value["mean"] is not None:
                found[ARMS[arm]] = value["mean"]
    return found


def _definitions(table: Mapping[str, Any]) -> str:
    return "".join(
        f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd>" for key, value in table.items()
    )


def _command(kept: dict[str, Any]) -> str:
    if kept.get("command"):
        return str(kept["command"])
    name = kept["protocol"].get("name")
    chosen = [f"protocol={name}"] if name else []
    if images := kept["protocol"].get("images"):
        chosen.append(f"images={images}")
    return shlex.join(["python", "evaluate.py", f"run={kept['run']}", *chosen])


def _text(value: Any) -> str:
    """A setting for people."""
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return number(value)
    return str(value)
