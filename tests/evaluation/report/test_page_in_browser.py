"""The report in a real browser, opened from disk: it shows, sorts and filters, and asks the network for nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.report.page import PictureRow, write_report
from scenes.scene import Scene, SceneObject

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH")


def row(place, layout, distance):
    rng = np.random.default_rng(place)
    picture, true = (Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2))
    colours = ("red", "green", "blue", "pink")
    objects = tuple(
        SceneObject(phrase=f"{colours[n]} circle", box=(0.2 * n, 0.2 * n, 0.2 * n + 0.3, 0.2 * n + 0.3))
        for n in range(1 + place % 4)
    )
    scene = Scene(id=f"s{place}", caption=f"scene {'even' if place % 2 == 0 else 'odd'}", objects=objects)
    scores = {"layout_iou": layout, "lpips": distance}
    return PictureRow(scene=scene, true=true, picture=picture, without_scene=None, scores=scores)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report's page, its eight scenes, and what the browser complained of or asked for."""
    playwright = pytest.importorskip("playwright.sync_api")
    layouts = [0.5, 0.1, 0.9, None, 0.3, 0.7, 0.2, 0.8]
    rows = [row(place, layout, place / 10) for place, layout in enumerate(layouts)]
    value = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 8}
    kept = {
        "values": {"with_scene": {"layout_iou": value, "lpips": value}},
        "protocol": {"name": "p", "scenes": 8},
        "versions": {},
        "weights_sha256": "0",
        "step": 1,
        "samples_seen": 1,
        "run": "r",
    }
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(file, kept, pictures=rows)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        opened.complaints, opened.asked = [], []
        opened.on("console", lambda message: opened.complaints.append(message.text))
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.goto(Path(file).as_uri())
        yield opened
        browser.close()


def shown(page):
    return page.eval_on_selector_all(".scene:not([hidden]) header code", "found => found.map(code => code.textContent)")


def reset(page):
    page.select_option("#pictures-by", "score:layout_iou")
    page.select_option("#pictures-order", "worst")
    for name in ("text", "least", "most"):
        page.fill(f"#pictures-{name}", "")


def test_it_opens_from_disk_with_pictures_and_without_a_complaint(page):
    sizes = page.eval_on_selector_all(".sheet img", "found => found.map(image => image.naturalWidth)")
    assert len(sizes) == 3 * 8
    assert min(sizes) > 0
    assert page.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in page.asked)
    assert page.is_visible(".tools")
    assert page.evaluate("getComputedStyle(document.querySelector('.with_scene .boxes')).display") == "block"
    page.click("label[for=boxes-none]")
    assert page.evaluate("getComputedStyle(document.querySelector('.with_scene .boxes')).display") == "none"


def test_it_sorts_by_any_score_worst_first(page):
    reset(page)
    assert shown(page) == ["s1", "s6", "s4", "s0", "s5", "s7", "s2", "s3"]  # one without a score comes last
    page.select_option("#pictures-order", "best")
    assert shown(page) == ["s2", "s7", "s5", "s0", "s4", "s6", "s1", "s3"]
    page.select_option("#pictures-order", "worst")
    page.select_option("#pictures-by", "score:lpips")  # of which a large value is the bad one
    assert shown(page) == [f"s{place}" for place in range(7, -1, -1)]
    page.select_option("#pictures-by", "objects")
    assert [int(name[1]) % 4 for name in shown(page)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_it_filters_by_words_and_number_of_objects(page):
    reset(page)
    page.fill("#pictures-text", "Even circle")
    assert set(shown(page)) == {"s0", "s2", "s4", "s6"}
    page.fill("#pictures-least", "3")
    assert set(shown(page)) == {"s2", "s6"}
    assert page.text_content("#pictures-count") == "2 of 8"
    page.fill("#pictures-text", "pink")
    page.fill("#pictures-most", "4")
    assert set(shown(page)) == {"s3", "s7"}
    page.fill("#pictures-most", "3")
    assert shown(page) == []
    assert page.complaints == []
