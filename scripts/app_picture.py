"""Takes the picture of the page that docs/app.md shows: `python -m scripts.app_picture FILE run=DIR [paths.runs=DIR]`.

It starts `app.py` with these settings and draws the example scene with the first run, beside the second where there is one.
A Chromium has to be on PATH.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

REPO = Path(__file__).parents[1]
SIZE = {"width": 1360, "height": 1180}
COLOURS = 128  # of the file, to keep it small


def main(file: str, *settings: str) -> None:
    """Serves, draws, photographs.

    Args:
        file: The PNG.
        *settings: Of `app.py`.
    """
    command = [sys.executable, "-u", "app.py", "scene=examples/four_shapes.json", *settings]
    process = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        url = next(line.split()[0] for line in process.stdout if line.startswith("http"))
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
            page.set_default_timeout(180_000)
            page.goto(url)
            page.wait_for_selector("#canvas canvas")
            side = "left"
            page.click("#other input")
            others = page.locator("[role=option]")
            if others.count() > 2:
                others.nth(2).click()
                side = "right"
            else:
                page.keyboard.press("Escape")
            page.click("#draw")
            page.wait_for_function(f"document.querySelector('#{side}_picture img')?.naturalWidth > 0")
            page.mouse.move(0, 0)
            page.evaluate("window.scrollTo(0, 0)")
            page.wait_for_timeout(1500)  # the bars that say how long it took fade
            page.screenshot(path=file)
            browser.close()
    finally:
        process.terminate()
        process.wait()
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
