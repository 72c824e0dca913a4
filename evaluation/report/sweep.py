"""The jobs of a sweep in one table and the plots that people draw of them: CSV, a page, and lines for a terminal.

`python -m evaluation.report.sweep DIR ... [out=DIR]` makes them of any folders that evaluations have left, a sweep's or single
ones. Only what stands in `metrics.json` and `scenes.csv` is read.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from evaluation.report.page import write_page
from evaluation.report.plots import Plot, Point, plot_section
from evaluation.report.wording import PRIMARY, SCORED, digits, lower_is_better, number, title
from files.atomic import write_atomically

JOBS = "jobs"
SETTINGS = ("steps", "guidance", "grounding_fraction")  # of the protocol, which a plot may have across
MOST_PLOTS = 24


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one evaluation has left.

    Attributes:
        out: Its folder.
        overrides: What was set for it.
        metrics: The content of `metrics.json`.
    """

    out: Path
    overrides: dict[str, str]
    metrics: dict[str, Any]

    @property
    def arm(self) -> str:
        """The arm that it is about."""
        return next((arm for arm in SCORED if arm in self.metrics["values"]), "with_scene")

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """The values of that arm by name."""
        return self.metrics["values"].get(self.arm, {})

    def mean(self, name: str) -> float | None:
        """A value; None where there is none."""
        return self.values.get(name, {}).get("mean")


def jobs_of(folder: str | Path) -> list[Job]:
    """The jobs of a sweep's folder, or the evaluation that a folder is.

    Args:
        folder: One with `jobs/<number>.json`, or with `metrics.json`.

    Returns:
        The jobs by number; one whose numbers are gone is left out.

    Raises:
        ValueError: It is neither.
    """
    folder = Path(folder)
    notes = sorted((folder / JOBS).glob("[0-9]*.json"), key=lambda path: int(path.stem))
    if not notes:
        if not (folder / "metrics.json").is_file():
            raise ValueError(f"{folder}: holds no evaluation and no sweep; name a folder with metrics.json or {JOBS}")
        return [_job(folder, {})]
    found = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
    return [
        _job(Path(note["out"]), _settings(note["overrides"]))
        for note in found
        if (Path(note["out"]) / "metrics.json").is_file()
    ]


def write_sweep(jobs: Sequence[Job], folder: str | Path) -> str:
    """Writes `sweep.csv` and `sweep.html`.

    Args:
        jobs: What to compare.
        folder: Where the files go.

    Returns:
        The table for a terminal, and where the files are.
    """
    folder = Path(folder)
    columns = _columns(jobs)
    names = sorted({name for job in jobs for name in job.values}, key=lambda name: (name != PRIMARY, name))
    write_atomically(folder / "sweep.csv", _csv(jobs, columns, names).encode())
    write_page(folder / "sweep.html", "Scenograph sweep", _page(jobs, columns, names))
    return f"{_lines(jobs, columns, names)}\n{folder / 'sweep.csv'}\n{folder / 'sweep.html'}"


def _job(out: Path, overrides: dict[str, str]) -> Job:
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return Job(out=out, overrides=overrides, metrics=metrics)


def _settings(overrides: Iterable[str]) -> dict[str, str]:
    parts = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in parts}


def _columns(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """What tells the jobs apart, a value for each of them: settings that differ, and the run where nothing else does."""
    names = list(dict.fromkeys(name for job in jobs for name in job.overrides if name != "out"))
    found = {name: [job.overrides.get(name, "") for job in jobs] for name in names}
    found = {name: said for name, said in found.items() if len(set(said)) > 1}
    if not found:
        found = {"run": [str(job.metrics["run"]) for job in jobs]}
    return found


def _csv(jobs: Sequence[Job], columns: dict[str, list[str]], names: Sequence[str]) -> str:
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    ends = ("mean", "low", "high", "count", "failed")
    heads = [name if end == "mean" else f"{name}.{end}" for name in names for end in ends]
    table.writerow([*columns, *heads, "not_measured", "out"])
    for place, job in enumerate(jobs):
        values = [job.values.get(name, {}).get(end) for name in names for end in ends]
        said = ["" if value is None else value for value in values]
        reasons = "; ".join(job.metrics.get("not_measured", {}))
        table.writerow([*(values[place] for values in columns.values()), *said, reasons, job.out])
    return file.getvalue()


def _lines(jobs: Sequence[Job], columns: dict[str, list[str]], names: Sequence[str]) -> str:
    """The table in columns of equal width."""
    rows = [[*columns, *names]]
    for place, job in enumerate(jobs):
        rows.append([*(said[place] for said in columns.values()), *(_mean(job, name) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _mean(job: Job, name: str) -> str:
    mean = job.mean(name)
    return number(mean, digits=digits([mean]))


def _page(jobs: Sequence[Job], columns: dict[str, list[str]], names: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    heads += "".join(
        f'<th scope="col">{escape(title(name))}{"<small>lower is better</small>" if lower_is_better(name) else ""}</th>'
        for name in names
    )
    rows = "".join(_row(job, [said[place] for said in columns.values()], names) for place, job in enumerate(jobs))
    about = (
        f"{len(jobs)} evaluations, protocol {', '.join(sorted({str(job.metrics['protocol']['name']) for job in jobs}))}"
    )
    sections = [
        f'<header><p class="eyebrow">Scenograph sweep</p><h1>{escape(", ".join(columns))}</h1>'
        f'<p class="verdict">{escape(about)}</p></header>',
        '<section id="table"><h2>Table</h2><p class="note">Means with 95 % bootstrap intervals over scenes.</p>'
        f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>',
        plot_section(_plots(jobs, columns, names), name="plots", heading="Plots"),
    ]
    return "\n".join(sections)


def _row(job: Job, settings: Sequence[str], names: Sequence[str]) -> str:
    first, *rest = settings
    cells = f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(said)}</td>" for said in rest)
    for name in names:
        value = job.values.get(name, {})
        decimals = digits([value.get(end) for end in ("mean", "low", "high")])
        mean, low, high = (number(value.get(end), digits=decimals) for end in ("mean", "low", "high"))
        cells += f"<td><b>{mean}</b><small>{f'{low} to {high}' if value.get('low') is not None else ''}</small></td>"
    return f"<tr>{cells}</tr>"


def _plots(jobs: Sequence[Job], columns: dict[str, list[str]], names: Sequence[str]) -> list[Plot]:
    """FID over CLIP, every score over every numeric setting that differs, and scores over the number of objects."""
    plots = [*_trade_offs(jobs, columns, names), *_over_settings(jobs, columns, names), *_over_objects(jobs, columns)]
    return plots[:MOST_PLOTS]


def _trade_offs(jobs: Sequence[Job], columns: dict[str, list[str]], names: Sequence[str]) -> list[Plot]:
    """Distances of distributions over scores of CLIP."""
    distances = [name for name in names if name.split(".")[-1].startswith(("fid", "kid", "cmmd"))]
    clips = [name for name in names if "clip" in name and name not in distances]
    return [
        Plot(
            title=f"{title(distance)} over {title(clip)}",
            x=title(clip),
            y=title(distance),
            series=_series(jobs, columns, clip, distance),
            note="Lower and further right is better.",
        )
        for distance in distances
        for clip in clips
    ]


def _over_settings(jobs: Sequence[Job], columns: dict[str, list[str]], names: Sequence[str]) -> list[Plot]:
    plots = []
    for setting in columns:
        across = [_number(said) for said in columns[setting]]
        if None in across or len(set(across)) < 2:
            continue
        for name in names:
            series: dict[str, list[Point]] = {}
            for place, (job, x) in enumerate(zip(jobs, across, strict=True)):
                value = job.values.get(name, {})
                if x is not None and value.get("mean") is not None:
                    point = Point(x=x, y=value["mean"], low=value.get("low"), high=value.get("high"))
                    series.setdefault(_label(columns, place, without=setting), []).append(point)
            ordered = {label: sorted(points, key=lambda point: point.x) for label, points in series.items()}
            short = setting.rpartition(".")[2].replace("_", " ")
            plots.append(Plot(title=f"{title(name)} over {short}", x=setting, y=title(name), series=ordered))
    return plots


def _over_objects(jobs: Sequence[Job], columns: dict[str, list[str]]) -> list[Plot]:
    """The first score of the scenes over the number of objects, a line a job."""
    found = {_label(columns, place): (job.arm, _scene_table(job.out)) for place, job in enumerate(jobs)}
    names = [
        head.partition("/")[2]
        for arm, rows in found.values()
        for head in (rows[0] if rows else ())
        if head.startswith(f"{arm}/")
    ]
    plots = []
    for name in list(dict.fromkeys(names))[:4]:
        series = {
            label: points for label, (arm, rows) in found.items() if (points := _by_objects(rows, f"{arm}/{name}"))
        }
        if any(len(points) > 1 for points in series.values()):
            plots.append(
                Plot(title=f"{title(name)} by complexity", x="objects in the scene", y=title(name), series=series)
            )
    return plots


def _series(jobs: Sequence[Job], columns: dict[str, list[str]], x: str, y: str) -> dict[str, list[Point]]:
    """Points of two values; jobs that differ in one numeric setting alone are one line, along that setting."""
    numeric = [name for name, said in columns.items() if all(_number(value) is not None for value in said)]
    along = numeric[0] if numeric else None
    found: dict[str, list[tuple[float, Point]]] = {}
    for place, job in enumerate(jobs):
        across, up = job.mean(x), job.mean(y)
        if across is None or up is None:
            continue
        at = _number(columns[along][place]) if along else 0.0
        said = f"{_label(columns, place)}: {across:.4g}, {up:.4g}"
        label = _label(columns, place, without=along)
        found.setdefault(label, []).append((at or 0.0, Point(x=across, y=up, said=said)))
    return {label: [point for _, point in sorted(points, key=lambda pair: pair[0])] for label, points in found.items()}


def _label(columns: dict[str, list[str]], place: int, *, without: str | None = None) -> str:
    """What a job is called: its settings that differ."""
    parts = [f"{name.rpartition('.')[2]}={said[place]}" for name, said in columns.items() if name != without]
    return ", ".join(parts) or "all"


def _scene_table(out: Path) -> list[dict[str, str]]:
    file = out / "scenes.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def _by_objects(rows: Sequence[dict[str, str]], column: str) -> list[Point]:
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.get(column):
            found.setdefault(int(row["objects"]), []).append(float(row[column]))
    return [
        Point(x=count, y=statistics.fmean(found[count]), said=f"{count} objects: {len(found[count])} scenes")
        for count in sorted(found)
    ]


def _number(said: str) -> float | None:
    try:
        return float(said)
    except ValueError:
        return None


def main(arguments: Sequence[str]) -> str:
    """Makes the table of the folders that a command line names.

    Args:
        arguments: Folders, and `out=DIR`; without it the files go into the first folder.

    Returns:
        What to print.

    Raises:
        ValueError: No folder is named, or one holds no evaluation.
    """
    folders = [argument for argument in arguments if not argument.startswith("out=")]
    out = next((argument[4:] for argument in arguments if argument.startswith("out=")), None)
    if not folders:
        raise ValueError("python -m evaluation.report.sweep DIR ... [out=DIR]: name folders of sweeps or evaluations")
    return write_sweep([job for folder in folders for job in jobs_of(folder)], out or folders[0])


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"evaluation.report.sweep: {error}")
