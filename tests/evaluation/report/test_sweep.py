"""The table of a sweep: of folders that evaluations have left, in CSV, on a page and for a terminal."""

import csv
import json

import pytest

from evaluation.report.page import write_metrics
from evaluation.report.sweep import jobs_of, main, write_sweep

HEAD = {"protocol": {"name": "shapes"}, "versions": {}, "weights_sha256": "0", "step": 1, "samples_seen": 1}


def value(mean):
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "count": 4, "failed": 0}


def table(folder):
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


@pytest.fixture
def sweep(tmp_path):
    """A sweep over two runs, two scales of guidance and two fractions, of which one job has failed."""
    number = 0
    for run in ("a", "b"):
        for scale in (1, 3):
            for fraction in (0.3, 1.0):
                out = tmp_path / run / f"{scale}_{fraction}"
                values = {
                    "layout_iou": value(0.5 + fraction / 4),
                    "fid_clean": value(20 + scale),
                    "clip_score": value(0.2),
                }
                if (run, scale, fraction) != ("b", 3, 1.0):
                    write_metrics(out / "metrics.json", {**HEAD, "values": {"with_scene": values}, "run": run})
                    (out / "scenes.csv").write_text(
                        "scene,objects,relations,with_scene/layout_iou\ns,1,0,0.9\nt,3,0,0.5\nu,3,0,\nv,3,0,0.7\n"
                    )
                overrides = [f"run={run}", f"+sampler.guidance={scale}", f"++sampler.grounding_fraction={fraction}"]
                note = tmp_path / "sweep" / "jobs" / f"{number}.json"
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(json.dumps({"out": str(out), "overrides": overrides}))
                number += 1
    return tmp_path / "sweep"


def test_the_table_has_a_row_a_job_and_a_column_for_what_differs(sweep):
    said = write_sweep(jobs_of(sweep), sweep)
    rows = table(sweep)
    assert len(rows) == 7
    assert list(rows[0])[:4] == ["run", "sampler.guidance", "sampler.grounding_fraction", "layout_iou"]
    assert {row["run"] for row in rows} == {"a", "b"}
    assert [float(row["fid_clean"]) for row in rows if row["sampler.guidance"] == "3"] == [23.0] * 3
    assert rows[0]["layout_iou.low"] == "0.565"
    lines = said.splitlines()
    assert lines[0].split()[:3] == ["run", "sampler.guidance", "sampler.grounding_fraction"]
    assert lines[1].split()[:4] == ["a", "1", "0.3", "0.575"]
    assert lines[-1].endswith("sweep.html")


def test_the_page_has_the_plots_that_people_draw(sweep):
    write_sweep(jobs_of(sweep), sweep)
    page = (sweep / "sweep.html").read_text()
    for title in ("FID clean over CLIP score", "Layout IoU over grounding fraction", "Layout IoU by complexity"):
        assert f"<b>{title}</b>" in page
    by_complexity = page.partition("<b>Layout IoU by complexity</b>")[2].partition("</figure>")[0]
    assert "3 objects: 2 scenes" in by_complexity
    over_fraction = page.partition("<b>Layout IoU over grounding fraction</b>")[2].partition("</figure>")[0]
    assert "run=a, guidance=3" in over_fraction
    assert over_fraction.count("<circle") == 7


def test_single_evaluations_are_compared_by_hand(sweep, tmp_path):
    out = tmp_path / "hand"
    said = main([str(tmp_path / "a" / "1_0.3"), str(tmp_path / "b" / "1_0.3"), f"out={out}"])
    assert [row["run"] for row in table(out)] == ["a", "b"]
    assert str(out / "sweep.html") in said


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no evaluation and no sweep"):
        jobs_of(tmp_path)
    with pytest.raises(ValueError, match="name folders"):
        main([])
