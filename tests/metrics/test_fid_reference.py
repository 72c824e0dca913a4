"""Statistics of true pictures, kept by one evaluation and compared with by another."""

import json

import pytest
from PIL import Image

from evaluation.evaluate import evaluate
from evaluation.plan import open_split
from metrics.fid import Reference
from runtime.composition import compose

FEW = ("metric=[fid]", "metric.fid.subsets=2", "protocol.scenes=4", "protocol.make.source.count=4", "protocol.arms=[]")


def test_an_evaluation_keeps_statistics_and_another_compares_with_them(torchscript, small_data, tmp_path):
    given = [*FEW, f"metric.fid.weights={torchscript}", f"paths.data={small_data}", f"true_rows={tmp_path / 'rows'}"]

    def evaluated(name, *overrides):
        cfg = compose("evaluate", [*given, f"out={tmp_path / name}", *overrides])
        return evaluate(cfg, None)["values"]

    evaluated("real", "images=real", f"references={tmp_path / 'references'}")
    file = tmp_path / "references" / "shapes.fid.npz"
    kept = Reference.load(file)
    assert (kept.mode, kept.count) == ("clean", 4)
    assert kept.split.startswith(str(small_data))
    split = open_split(compose("evaluate", [*given, "images=DIR"]), None)
    (tmp_path / "given").mkdir()
    for place, scene in enumerate(split.scenes):
        Image.fromarray(split.true.read(place)[::-1]).save(tmp_path / "given" / f"{scene.id}.png")
    images = f"images={tmp_path / 'given'}"
    with_pictures = evaluated("pictures", images)["pictures"]["fid_clean"].mean
    with_statistics = evaluated("statistics", images, f"metric.fid.reference={file}")["pictures"]["fid_clean"].mean
    assert with_pictures > 0
    assert with_statistics == pytest.approx(with_pictures, rel=1e-6)
    told = json.loads((tmp_path / "statistics" / "metrics.json").read_text())["metrics"]["fid"]
    assert told["reference"] == "shapes.fid.npz"


def test_metrics_that_compare_with_no_statistics_are_told(small_data, tmp_path, capsys):
    few = ["protocol.scenes=2", "protocol.make.source.count=4", f"paths.data={small_data}", f"out={tmp_path}"]
    evaluate(compose("evaluate", ["images=real", *few, f"references={tmp_path / 'kept'}"]), None)
    assert "none of shapes compares with statistics; name one, such as metric=[fid]" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()
