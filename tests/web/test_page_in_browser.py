"""The page in a real browser, served as people start it: scenes are drawn, related, saved, loaded, and become pictures."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from runtime.composition import compose
from runtime.run_config import restored_config
from sampling.image_record import read_record
from sampling.reproduce import again
from sampling.sample import draw
from tests.ranks import free_port

REPO = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIDE = 512  # px of the canvas
CIRCLE, SQUARE = "red plain circle", "blue striped square"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH")


@pytest.fixture(scope="module")
def url(short_run):
    """The address of a page over the short run."""
    run = Path(short_run[0].run)
    port = free_port()
    given = (f"paths.runs={run.parent}", f"run={run}", f"port={port}", "upload_bytes=20000", "objects=5")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py", *given],
        cwd=REPO,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("http"):
                break
        assert said[-1:] == [f"http://127.0.0.1:{port}/ (stop it with Ctrl-C)\n"], "".join(said)
        yield said[-1].split()[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, url):
    """The page, just opened, and what the browser asked for and complained of."""
    opened = browser.new_page(viewport={"width": 1280, "height": 1500})
    opened.set_default_timeout(120_000)
    opened.asked, opened.complaints = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("console", lambda message: opened.complaints.append(message.text) if message.type == "error" else None)
    opened.goto(url)
    opened.wait_for_selector("#canvas canvas")
    opened.wait_for_function("document.querySelector('#steps input[type=number]').value === '2'")  # the run's own
    yield opened
    opened.close()


def drag(page, left, top, right, bottom):
    """Moves the mouse over the canvas with the button down, in shares of the picture."""
    page.locator("#canvas canvas").scroll_into_view_if_needed()
    place = page.locator("#canvas canvas").bounding_box()
    corner = place["x"] + (place["width"] - SIDE) / 2, place["y"]
    ways = [(corner[0] + x * SIDE, corner[1] + y * SIDE) for x, y in ((left, top), (right, bottom))]
    page.mouse.move(*ways[0])
    page.mouse.down()
    page.mouse.move(*ways[1], steps=4)
    page.mouse.up()


def add(page, name, *place):
    drag(page, *place)
    page.locator("#model-box-edit input").first.fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#model-box-edit", state="detached")


def choose(page, field, words):
    page.click(f"#{field} input")
    page.locator("[role=option]", has_text=words).first.click()


def saved(page):
    with page.expect_download() as download:
        page.click("#save")
    return json.loads(Path(download.value.path()).read_text())


def load(page, file):
    with page.expect_file_chooser() as chooser:
        page.click("#load")
    chooser.value.set_files(file)


def shown(page, side="left"):
    """The bytes of the picture that is shown, once the page has answered."""
    page.click("#draw")
    page.wait_for_selector(f"#{side}_picture img")
    page.wait_for_function(f"document.querySelector('#{side}_picture img').naturalWidth > 0")
    return page.request.get(page.get_attribute(f"#{side}_picture img", "src")).body()


def test_boxes_are_drawn_named_related_and_become_a_picture_that_is_made_again(page, short_run, tmp_path):
    add(page, CIRCLE, 0.1, 0.1, 0.4, 0.5)
    add(page, SQUARE, 0.5, 0.5, 0.9, 0.8)
    page.fill("#caption textarea", "two shapes")
    choose(page, "subject", CIRCLE)
    choose(page, "target", SQUARE)
    page.click("#relate")
    page.wait_for_selector(f"#relations label:has-text('1 {CIRCLE} – left of – 2 {SQUARE}')")
    scene = saved(page)
    assert [item["phrase"] for item in scene["objects"]] == [CIRCLE, SQUARE]
    for item, expected in zip(scene["objects"], ([0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 0.8]), strict=True):
        assert item["box"] == pytest.approx(expected, abs=2 / SIDE)
    assert scene["relations"] == [{"subject": 0, "predicate": "left of", "object": 1}]
    file = tmp_path / "picture.png"
    file.write_bytes(shown(page))
    with Image.open(file) as picture:
        assert picture.size == (32, 32)
    assert page.evaluate("document.querySelector('#left_boxes img').naturalWidth") == 256
    record = read_record(file)
    assert (record.scene, record.settings["run"]) == (scene, str(short_run[0].run))
    made = again(compose("sample", [f"again={file}"]))
    assert draw(made.cfg, restored_config(made.cfg), made).read_bytes() == file.read_bytes()
    assert page.complaints == []
    assert all(request.startswith((page.url, "data:", "blob:")) for request in page.asked)


def test_a_box_is_moved_and_a_scene_is_saved_and_loaded(page, tmp_path):
    add(page, CIRCLE, 0.1, 0.1, 0.4, 0.5)
    page.click("#canvas button[aria-label='Drag boxes']")
    drag(page, 0.25, 0.3, 0.45, 0.4)
    moved = saved(page)
    assert moved["objects"][0]["box"] == pytest.approx([0.3, 0.2, 0.6, 0.6], abs=3 / SIDE)
    drag(page, *moved["objects"][0]["box"][2:], 0.8, 0.9)  # by its corner
    resized = saved(page)
    assert resized["objects"][0]["box"] == pytest.approx([0.3, 0.2, 0.8, 0.9], abs=4 / SIDE)

    example = json.loads((REPO / "examples" / "four_shapes.json").read_text())
    example["objects"][0]["box"][0] += 0.00123  # between pixels of the canvas
    file = tmp_path / "scene.json"
    file.write_text(json.dumps(example))
    load(page, file)
    page.wait_for_function("document.querySelector('#caption textarea').value.includes('red plain circle')")
    assert saved(page) == example


def test_two_choices_are_drawn_beside_one_another_on_one_scene_and_seed(page):
    add(page, CIRCLE, 0.1, 0.1, 0.4, 0.5)
    choose(page, "other", "short")
    page.fill("#seed input", "7")
    right = shown(page, "right")
    left = page.request.get(page.get_attribute("#left_picture img", "src")).body()
    pictures = [np.asarray(Image.open(io.BytesIO(content))) for content in (left, right)]
    assert np.array_equal(*pictures)
    assert b'"seeds": [7]' in left


def test_what_cannot_be_drawn_or_loaded_is_said_in_the_page(page, tmp_path):
    drag(page, 0.1, 0.1, 0.4, 0.5)
    page.wait_for_selector("#model-box-edit")
    page.keyboard.press("Enter")
    page.click("#draw")
    page.wait_for_selector("text=box 1: has no name; select it on the canvas")
    wrong, many, large = (tmp_path / name for name in ("wrong.json", "many.txt", "large.json"))
    wrong.write_text('{"id": "<b>a</b>", "objects": [{"phrase": "a", "box": [0, 0, 2, 1]}]}')
    many.write_text("\n".join(f"thing {number}" for number in range(6)))
    large.write_text(json.dumps({"id": "a", "caption": "a" * 30_000}))
    for file, message in (
        (wrong, "wrong.json: scene '<b>a</b>': objects[0].box: (0, 0, 2, 1) leaves [0, 1]"),
        (many, "6 objects, more than objects=5"),
        (large, "exceed the maximum allowed size"),
    ):
        load(page, file)
        page.wait_for_selector(f"text={message}")


def test_a_site_of_another_name_that_leads_here_is_refused(url):
    assert httpx.get(url, headers={"Host": "elsewhere.example"}, trust_env=False).status_code == 400
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
