"""What is in a folder of shards, counted: objects, boxes, phrases, captions, attributes, relations; as JSON and as charts.

Only scenes are read, no picture is decoded. Of data sets whose publishers tell such numbers, these stand beside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.shard_index import ShardEntry, read_index
from datamodules.shard_writer import Progress
from datamodules.storage import Folder, folder_at
from preparation.filters import area_of, label_of
from preparation.runner import read_scenes
from scenes.scene import Scene

STATISTICS = "statistics.json"
# By the source's name. LAION-SG: Li et al. 2024, arXiv 2412.08580, of all 540,005 pictures.
PUBLISHED: dict[str, dict[str, Any]] = {
    "laion_sg": {
        "cite": "Li et al. 2024, arXiv 2412.08580",
        "samples": 540005,
        "objects per scene": {"mean": 6.39, "deviation": 4.17},
        "words of captions": {"mean": 19.0},
        "relations": {"surrounded by": {"count": 80058, "share": 0.0378}},
        "attributes": {"tall": {"share": 0.0736}},
    }
}
_NUMBERS = (
    "objects per scene",
    "relations per scene",
    "attributes per object",
    "words of captions",
    "words of phrases",
    "words of descriptions",
)
_TABLES = ("labels", "attributes", "relations")
_AREA = "area of boxes"
_BINS = tuple(
    float(edge) for edge in (0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1)
)  # share of the picture
_ROWS = 200  # of a table that are written
_BARS = 20  # of a table that are drawn


class Statistics:
    """Counts of scenes; what they hold does not grow with their number but for the tables of words."""

    def __init__(self) -> None:
        self.scenes = 0
        self.numbers: dict[str, Counter[int]] = {name: Counter() for name in _NUMBERS}
        self.tables: dict[str, Counter[str]] = {name: Counter() for name in _TABLES}
        self.areas = np.zeros(len(_BINS) - 1, np.int64)

    def add(self, scene: Scene) -> None:
        """Count a scene."""
        self.scenes += 1
        numbers, tables = self.numbers, self.tables
        numbers["objects per scene"][len(scene.objects)] += 1
        numbers["relations per scene"][len(scene.relations)] += 1
        if scene.caption:
            numbers["words of captions"][len(scene.caption.split())] += 1
        for item in scene.objects:
            numbers["attributes per object"][len(item.attributes)] += 1
            numbers["words of phrases"][len(item.phrase.split())] += 1
            if item.description:
                numbers["words of descriptions"][len(item.description.split())] += 1
            tables["labels"][label_of(item)] += 1
            tables["attributes"].update(item.attributes)
            if (area := area_of(item)) is not None:
                self.areas[np.searchsorted(_BINS[1:-1], area, side="right")] += 1
        tables["relations"].update(relation.predicate for relation in scene.relations)

    def to_json(self, *, source: str) -> dict[str, Any]:
        """The counts as JSON values.

        Args:
            source: Name of the data set, whose published numbers are put beside.

        Returns:
            Numbers with mean, deviation and histogram; tables with their most frequent rows; published numbers.
        """
        published = {"published": PUBLISHED[source]} if source in PUBLISHED else {}
        return {
            "source": source,
            "scenes": self.scenes,
            **{name: _described(counts) for name, counts in self.numbers.items() if counts},
            **(
                {_AREA: {"edges": list(_BINS), "counts": self.areas.tolist(), "total": int(self.areas.sum())}}
                if self.areas.any()
                else {}
            ),
            **{name: _table(counts) for name, counts in self.tables.items() if counts},
            **published,
        }


def write_statistics(shards: str | Path, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Count what is in shards, and write `statistics.json` with a chart, PNG and SVG, for each of its parts.

    Args:
        shards: Folder that is read, a path or an address of fsspec's.
        out: Folder that is written, likewise.
        progress: Called with (scenes read, scenes).

    Returns:
        What was written as JSON.

    Raises:
        ShardError: There are no shards, or one cannot be read.
    """
    folder, target = folder_at(shards), folder_at(out)
    index = read_index(folder)
    entries = [ShardEntry(**entry) for entry in index["shards"]]
    total = sum(entry.count for entry in entries)
    statistics, done = Statistics(), 0
    for entry in entries:
        for scene in read_scenes(folder, entry):
            statistics.add(scene)
            done += 1
            if progress is not None:
                progress(done, total)
    found = statistics.to_json(source=index["source"]["name"])
    _draw(found, target)
    target.write(STATISTICS, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return found


def told(found: dict[str, Any]) -> str:
    """The statistics in a few lines, published numbers beside.

    Args:
        found: As `write_statistics` gives them.

    Returns:
        Lines for the terminal.
    """
    published = found.get("published", {})
    lines = [
        f"{found['source']}: {found['scenes']} scenes" + (f"; published: {published['cite']}" if published else "")
    ]
    for name in _NUMBERS:
        if name in found:
            lines.append(
                f"  {name}: {found[name]['mean']:.2f} ± {found[name]['deviation']:.2f}{_beside(published, name)}"
            )
    for name in _TABLES:
        if name in found:
            top = ", ".join(f"{row['name']} {row['share']:.2%}" for row in found[name]["top"][:3])
            lines.append(f"  {name}: {found[name]['different']} different; {top}{_beside(published, name)}")
    return "\n".join(lines)


def _beside(published: dict[str, Any], name: str) -> str:
    """A published number, as it stands behind ours."""
    if name not in published:
        return ""
    if "mean" in published[name]:
        deviation = published[name].get("deviation")
        return f" (published: {published[name]['mean']:g}{f' ± {deviation:g}' if deviation is not None else ''})"
    shares = [f"{word} {row['share']:.2%}" for word, row in published[name].items()]
    return f" (published: {', '.join(shares)})"


def _described(counts: Counter[int]) -> dict[str, Any]:
    values = np.array(sorted(counts), np.float64)
    weights = np.array([counts[int(value)] for value in values], np.float64)
    mean = float(np.average(values, weights=weights))
    deviation = float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))
    return {
        "mean": mean,
        "deviation": deviation,
        "total": int((values * weights).sum()),
        "histogram": {str(value): counts[value] for value in sorted(counts)},
    }


def _table(counts: Counter[str]) -> dict[str, Any]:
    total = counts.total()
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))[:_ROWS]
    return {
        "different": len(counts),
        "total": total,
        "top": [{"name": name, "count": count, "share": count / total} for name, count in rows],
    }


def _draw(found: dict[str, Any], target: Folder) -> None:
    """A chart of each part, in two formats."""
    from matplotlib import rc_context  # here, because nothing else needs it
    from matplotlib.figure import Figure

    published = found.get("published", {})

    def save(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{name}, {found['source']}", loc="left")
        for suffix in ("png", "svg"):
            file_name = f"{name.replace(' ', '_')}.{suffix}"
            with target.writing(file_name) as path, path.open("wb") as file, rc_context({"svg.hashsalt": name}):
                figure.savefig(file, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else None)

    for name in _NUMBERS:
        if name in found:
            save(name, (6, 3.2), lambda axes, name=name: _bars_of(axes, found[name], published.get(name)))
    if _AREA in found:
        save(_AREA, (6, 3.2), lambda axes: _bars_of_areas(axes, found[_AREA]["counts"]))
    for name in _TABLES:
        if name in found:
            rows = found[name]["top"][:_BARS]
            size = (6, 0.8 + 0.24 * len(rows))
            save(name, size, lambda axes, rows=rows, name=name: _bars_of_rows(axes, rows, published.get(name, {})))


def _bars_of(axes: Any, described: dict[str, Any], published: dict[str, Any] | None) -> None:
    values = [int(value) for value in described["histogram"]]
    axes.bar(values, list(described["histogram"].values()), width=0.9, color="#4878a8")
    axes.axvline(described["mean"], color="#20405f", label=f"mean {described['mean']:.2f}")
    if published is not None:
        axes.axvline(published["mean"], color="#c05030", linestyle="--", label=f"published {published['mean']:g}")
    axes.legend(frameon=False)
    axes.set_ylabel("number")


def _bars_of_areas(axes: Any, counts: Iterable[int]) -> None:
    names = [f"{low:g} to {high:g}" for low, high in zip(_BINS[:-1], _BINS[1:], strict=True)]
    axes.bar(names, list(counts), width=0.9, color="#4878a8")
    axes.tick_params("x", rotation=60)
    axes.set_xlabel("share of the picture")
    axes.set_ylabel("boxes")


def _bars_of_rows(axes: Any, rows: list[dict[str, Any]], published: dict[str, Any]) -> None:
    names = [str(row["name"])[:40].replace("$", r"\$") for row in rows][::-1]
    places = range(len(names))
    axes.barh(places, [row["share"] for row in rows][::-1], height=0.8, color="#4878a8")
    axes.set_yticks(places, names)
    for row, place in zip(rows[::-1], places, strict=True):
        if row["name"] in published:
            share = published[row["name"]]["share"]
            axes.plot(share, place, "D", color="#c05030", label=f"published {share:.2%}")
            axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("share")
