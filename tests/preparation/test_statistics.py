"""Statistics of shards: the numbers are those of the scenes, and published ones stand beside."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.shapes import Shapes
from preparation.statistics import STATISTICS, told, write_statistics
from scenes.scene import Relation, Scene, SceneObject
from tests.preparation.conftest import Listed


def graph(number):
    """No boxes; one relation, but of number 0."""
    objects = (SceneObject(phrase="tall $ man", label="man", attributes=("tall",)),) * (2 + number)
    relations = (Relation(subject=0, predicate="surrounded by", object=1),) if number else ()
    return Scene(id=str(number), caption="a b c", objects=objects, relations=relations)


def test_the_numbers_are_those_of_the_scenes(tmp_path):
    shards = write_shards(Shapes(count=40), tmp_path / "in", shard_size=15)
    reported = []
    found = write_statistics(shards, tmp_path / "out", progress=lambda done, total: reported.append((done, total)))
    assert reported[-1] == (40, 40)
    scenes = [ShardSet(shards).scene(n) for n in range(40)]
    counts = [len(scene.objects) for scene in scenes]
    assert found["scenes"] == 40
    assert found["objects per scene"]["mean"] == pytest.approx(np.mean(counts))
    assert found["objects per scene"]["deviation"] == pytest.approx(np.std(counts))
    assert found["objects per scene"]["histogram"] == {str(k): v for k, v in sorted(Counter(counts).items())}
    assert found["words of phrases"]["mean"] == 3
    assert found["attributes per object"]["histogram"] == {"2": sum(counts)}
    relations = Counter(relation.predicate for scene in scenes for relation in scene.relations)
    assert {row["name"]: row["count"] for row in found["relations"]["top"]} == relations
    assert sum(row["share"] for row in found["labels"]["top"]) == pytest.approx(1)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for scene in scenes for b in (item.box for item in scene.objects)]
    edges = found["area of boxes"]["edges"]
    assert found["area of boxes"]["counts"] == np.histogram(areas, edges)[0].tolist()
    assert "published" not in found
    assert json.loads((tmp_path / "out" / STATISTICS).read_text()) == found
    charts = {path.name for path in (tmp_path / "out").iterdir()} - {STATISTICS}
    names = ("objects_per_scene", "relations_per_scene", "area_of_boxes", "labels", "attributes", "relations")
    assert {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")} <= charts
    with Image.open(tmp_path / "out" / "relations.png") as chart:
        assert len(np.unique(np.asarray(chart.convert("L")))) > 10
    assert "words_of_descriptions.png" not in charts


def test_published_numbers_stand_beside(tmp_path):
    provides = "image caption phrases attributes relations"
    source = Listed([graph(number) for number in range(3)], lambda *_: Image.new("RGB", (4, 4)), provides=provides)
    source.name = "laion_sg"
    shards = write_shards(source, tmp_path / "in")
    found = write_statistics(shards, tmp_path / "out")
    lines = told(found).splitlines()
    assert lines[0] == "laion_sg: 3 scenes; published: Li et al. 2024, arXiv 2412.08580"
    assert "  objects per scene: 3.00 ± 0.82 (published: 6.39 ± 4.17)" in lines
    assert "  relations: 1 different; surrounded by 100.00% (published: surrounded by 3.78%)" in lines
    assert "area of boxes" not in found
    assert (tmp_path / "out" / "objects_per_scene.svg").stat().st_size


def test_no_shards_are_refused(tmp_path):
    with pytest.raises(ShardError, match="none"):
        write_statistics(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
