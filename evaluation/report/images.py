"""The pictures of the report: which scenes are shown, and how a scene looks there.

Pictures come ready made, with the scores of each scene; drawing boxes and graphs is `scenes.draw`'s, and sorting and
filtering in the page `report.js`'s, which reads what a card says of itself.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from evaluation.report.wording import ARMS, PRIMARY, SCORED, digits, lower_is_better, number, title
from scenes.draw import draw_boxes, draw_graph
from scenes.scene import Scene

SMALL = 128  # px: pictures up to this size are kept exactly and shown with hard pixels
SHOWN = 256  # px: longer side of a photograph in the report
BOXES = ("none", "scene", "all")  # on which pictures boxes may be laid
GRAPH = (256, 256)  # (width, height) px

Score = float | None


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """One scene with its pictures.

    Attributes:
        scene: What the pictures are to show.
        true: The picture that the scene describes, where there is one beside `picture`.
        picture: The picture that is scored.
        without_scene: The picture made from the caption alone.
        arm: What the scored picture is: made with the scene, real, or given.
        scores: The scene's own scores: `{metric: value}` of the scored picture, or
            `{arm: {metric: value}}` (the true picture's arm is "ceiling"). None is "no value".
        failures: Why metrics could not score the picture, a line each.
    """

    scene: Scene
    true: Image.Image | None
    picture: Image.Image
    without_scene: Image.Image | None
    arm: str = "with_scene"
    scores: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[str] = ()

    def score(self, metric: str, *, arm: str | None = None) -> Score:
        """A score of the scene in an arm, by default the scored one, if it is known."""
        return self.of_arm(arm or self.arm).get(metric)

    def of_arm(self, arm: str) -> Mapping[str, Score]:
        """All scores of one picture."""
        if any(name in ARMS for name in self.scores):
            return self.scores.get(arm, {})
        return self.scores if arm == self.arm else {}


@dataclass(frozen=True)
class Choice:
    """The scenes to show, by id: those drawn by lot, the best, best first, and the worst, worst first."""

    fixed: tuple[str, ...]
    best: tuple[str, ...]
    worst: tuple[str, ...]


def choose(scores: Mapping[str, Score], *, fixed: int = 24, extremes: int = 12) -> Choice:
    """Chooses scenes to show.

    The lot is drawn by a hash of the id alone, so that every report on a split shows the same scenes
    whatever they score. Choosing again among what was chosen gives the same.

    Args:
        scores: Score by scene id, higher is better; a scene without a score is among the fixed ones only.
        fixed: How many are drawn by lot.
        extremes: How many best and how many worst; fewer where they would meet.

    Returns:
        The ids.
    """
    lot = sorted(scores, key=lambda name: hashlib.sha256(name.encode()).digest())
    ranked = sorted((-score, name) for name, score in scores.items() if score is not None)
    names = [name for _, name in ranked]
    many = min(extremes, len(names) // 2)
    return Choice(tuple(lot[:fixed]), tuple(names[:many]), tuple(names[::-1][:many]))


def picture_section(rows: Sequence[PictureRow], *, metric: str = PRIMARY, of: int | None = None) -> str:
    """The pictures of the report as HTML: a card a scene, the worst by `metric` first, with what sorts and filters them.

    Args:
        rows: One a scene.
        metric: The score by which the cards lie at first; they stay as they are where no scene has it.
        of: How many scenes were scored, where these are not all.

    Returns:
        A section, or nothing where there are no rows.

    Raises:
        ValueError: Two rows are of one scene.
    """
    if not rows:
        return ""
    if len({row.scene.id for row in rows}) < len(rows):
        ids = len({row.scene.id for row in rows})
        raise ValueError(f"pictures: {len(rows)} rows have only {ids} scene ids; give one row a scene")
    columns = list(dict.fromkeys(name for row in rows for name in row.of_arm(row.arm)))
    metric = metric if metric in columns or not columns else columns[0]
    sign = -1 if lower_is_better(metric) else 1
    ranked = sorted(rows, key=lambda row: _rank(row.score(metric), sign))
    arm = rows[0].arm
    switches = "".join(
        f'<input type="radio" name="boxes" id="boxes-{key}"{" checked" if key == "scene" else ""}>' for key in BOXES
    )
    said = dict(zip(BOXES, ("off", ARMS[arm], "all"), strict=True))
    labels = "".join(f'<label for="boxes-{key}">{said[key]}</label>' for key in BOXES)
    choice = f" of {number(of)}, by lot, the best and the worst" if of is not None and of > len(rows) else ""
    unscored = sum(row.score(metric) is None for row in rows)
    note = f" {unscored} have none and come last." if unscored and columns else ""
    order = f" By {title(metric)} {SCORED[arm]}, worst first.{note}" if columns else ""
    return (
        f'<section id="pictures">{switches}<div class="heading">'
        f'<h2>Pictures</h2><div class="switch">boxes {labels}</div></div>'
        f'<p class="note">{number(len(rows))} scenes{choice}.{escape(order)}</p>{_tools(columns, metric)}'
        f'<div class="cards">{"".join(_card(row, metric) for row in ranked)}</div></section>'
    )


def _rank(score: Score, sign: int) -> tuple[bool, float]:
    """Where a scene stands among the ranked ones."""
    return (True, 0.0) if score is None or math.isnan(score) else (False, sign * score)


def _tools(columns: Sequence[str], metric: str) -> str:
    """What sorts and filters; hidden until the script shows it."""
    options = [("place", "as they lie", ""), ("objects", "number of objects", ""), ("failures", "failures", "lower")]
    options += [(f"score:{name}", title(name), "lower" if lower_is_better(name) else "") for name in columns]
    first = f"score:{metric}" if columns else "place"
    listed = "".join(
        f'<option value="{escape(key)}"{f""" data-better="{better}" """.rstrip() if better else ""}'
        f"{' selected' if key == first else ''}>{escape(name)}</option>"
        for key, name, better in options
    )
    return (
        '<div class="tools card" hidden>'
        f'<label>sort by <select id="pictures-by">{listed}</select></label>'
        '<label><select id="pictures-order" aria-label="order"><option value="worst">worst or smallest first</option>'
        '<option value="best">best or largest first</option></select></label>'
        '<label>words <input id="pictures-text" type="search" placeholder="caption, phrase, id"></label>'
        '<label>objects <input id="pictures-least" type="number" min="0" placeholder="from">'
        '<input id="pictures-most" type="number" min="0" placeholder="to" aria-label="objects at most"></label>'
        '<output id="pictures-count"></output></div>'
    )


def data_uri(picture: Image.Image) -> str:
    """The picture itself as an address: JPEG where it is a photograph, else PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    photograph = max(picture.size) > SMALL and picture.mode == "RGB"
    if photograph:
        picture.save(buffer, format="JPEG", quality=84, optimize=True)
    else:
        picture.save(buffer, format="PNG")
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def overlay(scene: Scene, *, size: tuple[int, int]) -> Image.Image:
    """The boxes of a scene alone, to lay over any picture of it.

    What `draw_boxes` puts on white and on black tells how much of the ground shows through, so one overlay
    does for all pictures of a scene, which stay as they are below it.

    Args:
        scene: Its boxes.
        size: (width, height) px of the pictures.

    Returns:
        RGBA, of the size that `draw_boxes` makes of such pictures.
    """
    white, black = (
        np.asarray(draw_boxes(Image.new("RGB", size, ground), scene).convert("RGB"), dtype=np.float32)
        for ground in ("white", "black")
    )
    alpha = 255 - (white - black).mean(-1, keepdims=True)
    colour = np.where(alpha > 0, black * 255 / np.maximum(alpha, 1), 0)
    return Image.fromarray(np.concatenate([colour, alpha], -1).round().clip(0, 255).astype(np.uint8))


def _card(row: PictureRow, metric: str) -> str:
    caption = escape(row.scene.caption) or "no caption"
    graph = draw_graph(row.scene, size=GRAPH).quantize(64)  # flat colours: fewer bytes
    pictures = {
        "ceiling": ("true", row.true),
        row.arm: (ARMS[row.arm], row.picture),
        "without_scene": (ARMS["without_scene"], row.without_scene),
    }
    figures = "".join(
        _figure(row, arm, name, _shown(picture), metric)
        for arm, (name, picture) in pictures.items()
        if picture is not None
    )
    scores = "".join(
        f"<span>{escape(title(name))} <b>{number(score, digits=digits([score], most=2))}</b></span>"
        for name, score in row.of_arm(row.arm).items()
    )
    boxes = data_uri(overlay(row.scene, size=_shown(row.picture).size))
    failed = "".join(f'<p class="failure">{escape(reason)}</p>' for reason in row.failures)
    return (
        f'<article class="scene card" style="--boxes:url({boxes})" {_said(row)}>'
        f"<header><p>{caption}</p><code>{escape(row.scene.id)}</code></header>"
        f'<div class="sheet"><figure class="graph"><img alt="scene graph" src="{data_uri(graph)}">'
        f"<figcaption>scene graph</figcaption></figure>{figures}</div>"
        f"{f'<footer><span>{ARMS[row.arm]}:</span>{scores}</footer>' if scores else ''}{failed}</article>"
    )


def _said(row: PictureRow) -> str:
    """What the script reads of a card, as attributes."""
    scene = row.scene
    words = [scene.id, scene.caption, *(item.phrase for item in scene.objects), *(r.predicate for r in scene.relations)]
    scores = {name: score for name, score in row.of_arm(row.arm).items() if score is not None and math.isfinite(score)}
    said = {
        "text": " ".join(words).lower(),
        "objects": str(len(scene.objects)),
        "failures": str(len(row.failures)),
        "scores": json.dumps(scores),
    }
    return " ".join(f'data-{key}="{escape(value)}"' for key, value in said.items())


def _figure(row: PictureRow, arm: str, name: str, picture: Image.Image, metric: str) -> str:
    score = row.score(metric, arm=arm)
    value = f" <b>{number(score, digits=digits([score], most=2))}</b>" if score is not None else ""
    pixels = ' class="pixels"' if max(picture.size) <= SMALL else ""
    alt = escape(f"{name}: {row.scene.caption}")
    return (
        f'<figure class="{arm}"><div class="stack"><img{pixels} alt="{alt}" src="{data_uri(picture)}">'
        f'<span class="boxes"></span></div><figcaption><i></i>{escape(name)}{value}</figcaption></figure>'
    )


def _shown(picture: Image.Image) -> Image.Image:
    """The picture at its size in the report; boxes are drawn at this size, so that labels stay legible."""
    picture = picture.convert("RGB")
    if max(picture.size) > SHOWN:
        picture.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    return picture
