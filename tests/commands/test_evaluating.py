"""The scripts as people run them: evaluate, by one process and by two, over a sweep."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest


def test_evaluation_gives_the_same_numbers_again_and_in_other_batches(trained, data, tmp_path, run, read):
    folder = trained[0]
    common = (f"run={folder}", data, "protocol.scenes=6", "protocol.make.source.count=6")
    results, pictures = [], []
    for name, size in (("a", 6), ("b", 6), ("c", 4)):
        run("evaluate.py", *common, f"out={tmp_path / name}", f"protocol.batch_size={size}")
        results.append(json.loads((tmp_path / name / "metrics.json").read_text())["values"])
        files = sorted((tmp_path / name / "with_scene" / "pictures").glob("*.png"))
        pictures.append(np.stack([read(file) for file in files]))
        assert (tmp_path / name / "report.html").stat().st_size > 10_000
    assert results[0] == results[1]
    assert np.array_equal(pictures[0], pictures[1])
    assert abs(pictures[0] - pictures[2]).max() <= 1
    for arm, values in results[0].items():
        for name, value in values.items():
            assert results[2][arm][name]["mean"] == pytest.approx(value["mean"], abs=1e-3)


def test_two_processes_at_once_evaluate_as_one_does(trained, data, tmp_path, run, start):
    common = (f"run={trained[0]}", data, "protocol.scenes=6", "protocol.make.source.count=6", "protocol.batch_size=2")
    run("evaluate.py", *common, f"out={tmp_path / 'whole'}")
    processes = [
        start("evaluate.py", *common, f"out={tmp_path / 'parts'}", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert parts["values"] == whole["values"]
    assert parts["weights_sha256"] == whole["weights_sha256"]
    assert not list((tmp_path / "parts").glob("*/journal-*"))


def test_a_sweep_of_evaluations_ends_with_one_table(trained, data, tmp_path, run):
    out = run(
        "evaluate.py",
        "-m",
        f"run={trained[0]}",
        data,
        "protocol.scenes=4",
        "protocol.make.source.count=6",
        "sampler.guidance=1,3",
        "sampler.grounding_fraction=0.5,1.0",
        f"out={tmp_path / 'jobs'}",
        f"paths.runs={tmp_path / 'runs'}",
    )
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    settings = [(row["sampler.guidance"], row["sampler.grounding_fraction"]) for row in rows]
    assert settings == [("1", "0.5"), ("1", "1.0"), ("3", "0.5"), ("3", "1.0")]
    assert len({row["out"] for row in rows}) == 4
    for row in rows:
        kept = json.loads((Path(row["out"]) / "metrics.json").read_text())
        assert float(kept["protocol"]["guidance"]) == float(row["sampler.guidance"])
        assert float(row["layout_iou"]) == kept["values"]["with_scene"]["layout_iou"]["mean"]
    assert out.splitlines()[-1] == str(folder / "sweep.html")
    assert "Layout IoU over grounding fraction" in (folder / "sweep.html").read_text()
    assert len(list((tmp_path / "jobs" / "rows" / "ceiling").iterdir())) == 1  # measured once for all jobs


def test_real_pictures_are_the_upper_bound(trained, data, tmp_path, run):
    run(
        "evaluate.py",
        f"run={trained[0]}",
        data,
        "protocol.scenes=6",
        "protocol.make.source.count=6",
        "images=real",
        f"out={tmp_path}",
    )
    values = json.loads((tmp_path / "metrics.json").read_text())["values"]
    assert set(values) == {"real", "ceiling", "floor"}
    assert values["real"] == values["ceiling"]
    assert values["ceiling"]["layout_iou"]["mean"] > 0.95
