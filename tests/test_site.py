"""The documentation as a site: it builds without a warning, has the API, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_the_site_builds_with_the_api_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)]
    told = subprocess.run(
        command,
        cwd=REPO,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stdout) == (0, "")
    scenes = (tmp_path / "api" / "scenes.html").read_text()
    assert 'id="scenes.scene.Scene.without_layout"' in scenes
    assert "Raises" in scenes
    pages = [*tmp_path.glob("*.html"), *tmp_path.glob("decisions/*.html")]
    assert {page.stem for page in pages} >= {path.stem for path in (REPO / "docs").glob("*.md")}
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img)[^>]+src="(https?:[^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)"',
            page.read_text(),
        )
        assert not loaded, page
