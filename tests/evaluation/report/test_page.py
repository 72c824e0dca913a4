"""The files an evaluation leaves: whole, stable, self-contained, and with everything escaped."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.report.page import PictureRow, write_metrics, write_report
from scenes.scene import Relation, Scene, SceneObject

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = """"><script>alert(1)</script><img src=x onerror='a'>&amp;{name} https://example.org/x"""
EMPTY_TAGS = {"meta", "img", "input"}


@dataclasses.dataclass(frozen=True)
class Value:
    mean: float
    low: float
    high: float
    count: int


def metrics(**changes):
    values = {
        "floor": {"layout_iou": Value(0.09, 0.08, 0.1, 20)},
        "with_scene": {"layout_iou": Value(0.86, 0.84, 0.88, 20), "colour": Value(0.9, 0.8, 1.0, 19)},
        "ceiling": {"layout_iou": Value(0.99, 0.98, 1.0, 20)},
        "without_scene": {"layout_iou": Value(0.1, 0.09, 0.12, 20)},
    }
    kept = {
        "values": values,
        "protocol": {
            "split": "val",
            "name": "shapes",
            "steps": 50,
            "zeta": 1,
            "seeds": (0, 1),
            "filters": {},
        },
        "versions": {"torch": "2.15.0", "python": "3.11.7"},
        "weights_sha256": "9f86d081",
        "step": 12000,
        "samples_seen": 768000,
        "run": "runs/shapes boxes",
    }
    return {**kept, **changes}


def row(name, *, score=0.5, caption="a red circle", size=(32, 32), true=True, phrase="red circle"):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    first, second, third = (
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(3)
    )
    objects = tuple(
        SceneObject(phrase=phrase, box=(x / 2, y / 2, x / 2 + 0.4, y / 2 + 0.4)) for x in (0, 1) for y in (0, 1)
    )
    relations = (Relation(subject=0, predicate="left of", object=1),)
    scene = Scene(id=name, caption=caption, objects=objects, relations=relations)
    scores = {"layout_iou": score, "colour": 1.0}
    return PictureRow(scene=scene, true=first if true else None, picture=second, without_scene=third, scores=scores)


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text outside the style, and whether tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = Counter(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *item) for item in attrs]
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def said(self):
        return re.sub(r"[ \n]+", " ", " ".join(self.text))


def report(path, *args, **kwargs):
    write_report(path / "report.html", *args, **kwargs)
    return (path / "report.html").read_text(encoding="utf-8")


def test_metrics_are_in_a_stable_order(tmp_path):
    write_metrics(tmp_path / "metrics.json", metrics(extra=1))
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert list(kept) == [*metrics(), "extra"]
    assert list(kept["values"]) == ["with_scene", "without_scene", "ceiling", "floor"]
    assert list(kept["values"]["with_scene"]) == ["colour", "layout_iou"]
    assert list(kept["values"]["with_scene"]["colour"].items()) == [
        ("mean", 0.9),
        ("low", 0.8),
        ("high", 1.0),
        ("count", 19),
    ]
    assert list(kept["protocol"]) == ["name", "split", "steps", "seeds", "filters", "zeta"]
    turned = dict(reversed(metrics(extra=1).items()))
    write_metrics(tmp_path / "again.json", turned)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "metrics.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "metrics.json"]


def test_numbers_are_finite_or_null(tmp_path):
    values = {"with_scene": {"a": Value(math.nan, -math.inf, np.float32(0.5), np.int64(3))}}
    values["floor"] = {"a": {"mean": torch.tensor(0.25), "low": None, "high": np.float64("nan"), "count": 0}}
    write_metrics(tmp_path / "metrics.json", metrics(values=values))
    kept = json.loads((tmp_path / "metrics.json").read_text())["values"]
    assert kept["with_scene"]["a"] == {"mean": None, "low": None, "high": 0.5, "count": 3}
    assert kept["floor"]["a"] == {"mean": 0.25, "low": None, "high": None, "count": 0}
    assert "–" in Page(report(tmp_path, metrics(values=values))).said()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": {"with-scene": {}}}, "'with-scene' is no arm; give some of with_scene, without_scene"),
        (
            {"values": {"floor": {"a": 0.5}}},
            r"values: floor\.a: 0\.5 is no value; give mean, low, high, count",
        ),
        ({"values": {"floor": {"a": {"mean": 1.0}}}}, r"floor\.a: .* give mean, low, high, count"),
        ({"protocol": {"seeds": {1, 2}}}, r"metrics: protocol\.seeds: set does not fit into JSON"),
        ({"versions": [torch.ones(2)]}, r"metrics: versions\[0\]: Tensor does not fit into JSON"),
    ],
)
def test_metrics_that_make_no_sense_are_named(tmp_path, changes, message):
    for write in (write_metrics, write_report):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "file", metrics(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_key_is_named(tmp_path):
    kept = metrics()
    del kept["weights_sha256"]
    with pytest.raises(ValueError, match="metrics: 'weights_sha256' is missing; give all of values, protocol"):
        write_metrics(tmp_path / "metrics.json", kept)


def test_report_says_what_was_measured(tmp_path):
    curves = {"loss": [(0, 1.0), (10, 0.5)], "val/layout_iou": [(0, 0.1), (10, 0.8)]}
    rows = [row(f"scene-{n}", score=n / 10) for n in range(8)]
    text = report(tmp_path, metrics(), pictures=rows, curves=curves)
    said = Page(text).said()
    assert "Layout IoU 0.86 with the scene, 0.10 without; ceiling 0.99, floor 0.09" in said
    assert "0.840 to 0.880, n = 20" in said
    assert "python evaluate.py 'run=runs/shapes boxes' protocol=shapes" in said
    for fact in (
        "9f86d081",
        "2.15.0",
        "768\N{NARROW NO-BREAK SPACE}000",
        "a red circle",
        "scene-3",
        "floor 0.090",
    ):
        assert fact in said
    assert re.findall(r"<code>(scene-\d)</code>", text) == [f"scene-{n}" for n in range(8)]  # worst first


@pytest.mark.parametrize(
    ("arm", "images", "label", "of"),
    [
        ("real", "real", "real pictures", "of the real pictures"),
        ("pictures", "a b", "given pictures", "of the given pictures"),
    ],
)
def test_pictures_that_no_scene_made_are_not_said_to_be(tmp_path, arm, images, label, of):
    values = {arm: {"layout_iou": Value(0.9, 0.8, 1.0, 20)}, "ceiling": {"layout_iou": Value(1.0, 1.0, 1.0, 20)}}
    rows = [dataclasses.replace(row(name), arm=arm, without_scene=None) for name in "abcd"]
    kept = metrics(values=values, protocol={"name": "shapes", "images": images})
    page = Page(report(tmp_path, kept, pictures=rows))
    said = page.said()
    assert f"Layout IoU 0.90 {of}; ceiling 1.00" in said
    assert f"By Layout IoU {of}, worst first." in said
    assert said.count(label) >= 2 * len(rows)
    assert "with the scene" not in said
    assert shlex.join([f"images={images}"]) in said
    assert page.tags["figure"] == 3 * len(rows)
    assert len([kind for tag, _, kind in page.attributes if (tag, kind) == ("figure", arm)]) == len(rows)


def test_published_numbers_stand_beside_with_their_source(tmp_path):
    systems = {
        "GLIGEN": {"source": "Table 9", "values": {"colour": 0.5, "fid_clean": 21.04}},
        "LAMA": {"source": "Table 8", "values": {"fid_clean": 31.12}},
    }
    said = Page(report(tmp_path, metrics(published=systems))).said()
    assert "FID clean lower is better – 21.04 31.12" in said
    assert "Colour 0.900 0.800 to 1.000, n = 19 0.500 –" in said
    assert "Table 9" in said
    assert "As published, not measured here" in said


def test_a_published_value_of_another_implementation_stands_beside_ours_and_is_named(tmp_path):
    systems = {"GLIGEN": {"source": "Table 9", "values": {"fid": 21.04, "colour": 0.5}}}
    others = {"fid": {"implementation": "not known", "beside": "colour"}}
    said = Page(report(tmp_path, metrics(published=systems, implementations=others))).said()
    assert "FID lower is better published: not known 0.90 0.80 to 1.00, n = 19 here: colour 21.04" in said
    assert "Colour 0.900 0.800 to 1.000, n = 19 0.500" in said


def test_what_was_not_measured_is_listed_with_its_reason(tmp_path):
    failures = {"with_scene": {"sg_iou": {"count": 3, "first": ["a: the judge said nothing"]}}}
    kept = metrics(not_measured={"fid": "inception.pt is not there; fetch it"}, failures=failures)
    said = Page(report(tmp_path, kept)).said()
    assert "fid inception.pt is not there; fetch it" in said
    assert "sg_iou, with the scene 3 pictures: a: the judge said nothing" in said
    assert "Not measured" not in Page(report(tmp_path, metrics())).said()


def test_a_given_command_is_shown(tmp_path):
    assert "python evaluate.py run=x images=real" in report(
        tmp_path, metrics(command="python evaluate.py run=x images=real")
    )


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    first, second = (
        report(tmp_path, metrics(), pictures=[row("a"), row("b")], curves={"loss": [(0, 1.0)]}) for _ in range(2)
    )
    assert first == second


def test_everything_is_escaped(tmp_path):
    hostile = metrics(
        values={"with_scene": {HOSTILE: Value(0.5, 0.4, 0.6, 5), "layout_iou": Value(0.5, 0.4, 0.6, 5)}},
        protocol={"name": HOSTILE, "split": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}},
        versions={HOSTILE: HOSTILE},
        weights_sha256=HOSTILE,
        step=HOSTILE,
        run=HOSTILE,
        command=HOSTILE,
    )
    rows = [row(HOSTILE, caption=HOSTILE, phrase=HOSTILE), row("b", caption=HOSTILE, score=None)]
    page = Page(report(tmp_path, hostile, pictures=rows, curves={HOSTILE: [(0, 0.5)], "loss": []}))
    assert page.tags["script"] == 1
    assert page.tags["img"] == 2 * 4
    assert not [item for item in page.attributes if item[1].startswith("on")]
    assert page.said().count("<script>alert(1)</script>") > 10
    alts = {text for tag, name, text in page.attributes if (tag, name) == ("img", "alt")}
    assert alts == {"scene graph", *(f"{arm}: {HOSTILE}" for arm in ("true", "with the scene", "without"))}


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = report(tmp_path, metrics(), pictures=[row("a", caption=HOSTILE)], curves={"loss": [(0, 1.0)]})
    page = Page(text)
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href", "xmlns"}
    addresses = [text for _, name, text in page.attributes if name in loading]
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert page.tags.keys().isdisjoint({"link", "iframe", "object", "embed", "base", "video", "audio"})
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    assert re.search(r"url\(|@import|https?:", style) is None
    inline = [text for _, name, text in page.attributes if name == "style"]
    assert all(re.fullmatch(r"--boxes:url\(data:image/png;base64,[\w+/=]+\)|[a-z]+:[\d.]+%", said) for said in inline)
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("meta", "content", policy) in page.attributes
    assert "//" not in re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text).replace("https://example.org", "")


def test_links_inside_the_page_lead_somewhere(tmp_path):
    page = Page(report(tmp_path, metrics(), pictures=[row(name) for name in "abcd"]))
    ids = [text for _, name, text in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {text.removeprefix("#") for _, name, text in page.attributes if name in ("href", "for")}
    assert wanted <= set(ids)
    assert {"boxes-none", "boxes-scene", "boxes-all"} <= wanted


def test_what_is_not_there_leaves_no_trace(tmp_path):
    page = Page(report(tmp_path, metrics(values={})))
    assert "No metric was measured" in page.said()
    assert page.tags["img"] == page.tags["figure"] == 0
    assert page.tags["h2"] == 2
    page = Page(report(tmp_path, metrics(), pictures=[row("a", true=False, caption="", score=None)]))
    assert page.tags["img"] == 3
    assert "no caption" in page.said()


def test_one_scene_has_one_row(tmp_path):
    with pytest.raises(ValueError, match="2 rows have only 1 scene ids; give one row a scene"):
        write_report(tmp_path / "report.html", metrics(), pictures=[row("a"), row("a")])


def test_the_report_stays_small(tmp_path):
    noise = [row(f"scene-{n}", score=n / 48) for n in range(48)]  # nothing compresses worse
    assert len(report(tmp_path, metrics(), pictures=noise)) < 3e6


def test_photographs_are_made_smaller(tmp_path):
    rows = [row("a", size=(640, 480)), row("b", size=(96, 64))]
    page = report(tmp_path, metrics(), pictures=rows)
    assert page.count("data:image/jpeg") == page.count('class="pixels"') == 3
    assert len(page) < 4e5


def test_bookkeeping_does_not_import_torch():
    code = "import sys, sampling.manifest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
