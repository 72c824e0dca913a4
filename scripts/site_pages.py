"""Pages of the site that nobody writes: a page of the API for each package, from its docstrings. A hook of mkdocs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "scenes",
    "datamodules",
    "preparation",
    "labelling",
    "models",
    "lightning_modules",
    "callbacks",
    "metrics",
    "evaluation",
    "loggers",
)
DECISIONS = "decisions"


def modules(package: str) -> Iterator[str]:
    """Dotted names of a package's modules, those of its folders behind its own."""
    for path in sorted((ROOT / package).rglob("*.py"), key=lambda path: (len(path.parts), path)):
        if not path.name.startswith("_"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def page(package: str) -> str:
    """The page of a package: what it says of itself, then every module."""
    parts = [f"# {package}", f"::: {package}\n    options:\n      show_root_heading: false\n      members: false"]
    return "\n\n".join([*parts, *(f"::: {name}" for name in modules(package))]) + "\n"


def on_config(config: Any) -> Any:
    """Lists in the navigation what has one line there: the decisions, in their order, and the packages."""
    decisions = [str(path.relative_to(ROOT / "docs")) for path in sorted((ROOT / "docs" / DECISIONS).glob("*.md"))]
    pages = {DECISIONS: decisions, "api": [{name: f"api/{name}.md"} for name in PACKAGES]}
    config.nav = [_filled(entry, pages) for entry in config.nav]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages of the API."""
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=page(package)))
    return files


def _filled(entry: Any, pages: dict[str, Any]) -> Any:
    if isinstance(entry, dict):
        return {title: _filled(inside, pages) for title, inside in entry.items()}
    if isinstance(entry, list):
        return [_filled(inside, pages) for inside in entry]
    return pages.get(entry, entry)
