"""The rows of pictures in the report: which scenes are shown, and how a scene looks there.

Pictures come ready made, with the scores of each scene; drawing boxes and graphs is `scenes.draw`'s.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from evaluation.wording import ARMS, PRIMARY, SCORED, lower_is_better, number, title
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
    """

    scene: Scene
    true: Image.Image | None
    picture: Image.Image
    without_scene: Image.Image | None
    arm: str = "with_scene"
    scores: Mapping[str, Any] = field(default_factory=dict)

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
    whatever they score. Choosing again among what was chosen gives the same: a caller may load only those
    pictures.

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


def picture_section(rows: Sequence[PictureRow], *, metric: str = PRIMARY, fixed: int = 24, extremes: int = 12) -> str:
    """The pictures of the report as HTML: the fixed scenes, the best and the worst by `metric`.

    Args:
        rows: One a scene.
        metric: Which of the rows' scores ranks them.
        fixed: As `choose` takes it.
        extremes: As `choose` takes it.

    Returns:
        A section, or nothing where there are no rows.

    Raises:
        ValueError: Two rows are of one scene.
    """
    if not rows:
        return ""
    by_id = {row.scene.id: row for row in rows}
    if len(by_id) < len(rows):
        raise ValueError(f"pictures: {len(rows)} rows have only {len(by_id)} scene ids; give one row a scene")
    sign = -1 if lower_is_better(metric) else 1
    found = {name: row.score(metric) for name, row in by_id.items()}
    known = {name: None if score is None else sign * score for name, score in found.items()}
    choice = choose(known, fixed=fixed, extremes=extremes)
    unscored = sum(score is None for score in known.values())
    note = f"{unscored} of {len(rows)} have no {title(metric)} and are not ranked." if unscored else ""
    arm = rows[0].arm
    groups = {
        "fixed": ("Fixed set", "Drawn by lot: the same scenes whatever they score.", choice.fixed),
        "best": ("Best", f"By {title(metric)} {SCORED[arm]}, best first. {note}", choice.best),
        "worst": ("Worst", f"By {title(metric)} {SCORED[arm]}, worst first. {note}", choice.worst),
    }
    cards = {name: _card(by_id[name], metric) for name in {*choice.fixed, *choice.best, *choice.worst}}
    links = "".join(f'<a href="#{key}">{group[0]}</a>' for key, group in groups.items() if group[2])
    shown = "".join(
        f'<section class="group" id="{key}"><h3>{name}</h3><p class="note">{escape(said)}</p>'
        f'<div class="cards">{"".join(cards[name] for name in names)}</div></section>'
        for key, (name, said, names) in groups.items()
        if names
    )
    switches = "".join(
        f'<input type="radio" name="boxes" id="boxes-{key}"{" checked" if key == "scene" else ""}>' for key in BOXES
    )
    said = dict(zip(BOXES, ("off", ARMS[arm], "all"), strict=True))
    labels = "".join(f'<label for="boxes-{key}">{said[key]}</label>' for key in BOXES)
    return (
        f'<section id="pictures">{switches}<div class="heading">'
        f'<h2>Pictures</h2><nav>{links}</nav><div class="switch">boxes {labels}</div></div>{shown}</section>'
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
        f"<span>{escape(title(name))} <b>{number(score, digits=2)}</b></span>"
        for name, score in row.of_arm(row.arm).items()
    )
    boxes = data_uri(overlay(row.scene, size=_shown(row.picture).size))
    return (
        f'<article class="scene card" style="--boxes:url({boxes})">'
        f"<header><p>{caption}</p><code>{escape(row.scene.id)}</code></header>"
        f'<div class="sheet"><figure class="graph"><img alt="scene graph" src="{data_uri(graph)}">'
        f"<figcaption>scene graph</figcaption></figure>{figures}</div>"
        f"{f'<footer><span>{ARMS[row.arm]}:</span>{scores}</footer>' if scores else ''}</article>"
    )


def _figure(row: PictureRow, arm: str, name: str, picture: Image.Image, metric: str) -> str:
    score = row.score(metric, arm=arm)
    value = f" <b>{number(score, digits=2)}</b>" if score is not None else ""
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
