"""The page: a canvas for boxes, relations between them, weights and settings, and the pictures.

What a handler does with a scene is in `draft.py`, what draws in `painters.py`; here is how they hang together. Gradio calls the
handlers, each with what the browser holds at that moment.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio_image_annotation import image_annotator
from omegaconf import DictConfig
from PIL import Image

from runtime.command import explanation
from sampling.image_record import read_record, save_picture
from scenes import Scene, SceneError
from scenes.draw import draw_boxes
from scenes.forms import read_scene
from web.draft import SIDE, Draft
from web.painters import Choice, Painters, choices

LONGEST = 2000  # characters of a text
RELATIONS = ("left of", "right of", "above", "below", "inside", "surrounding", "on", "next to", "holding")
ANY = "any"
NOTHING = "nothing"
PICTURES = 24  # that stay in the folder, the newest
CSS = """
.pixels img { image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%; }
#canvas button[aria-label^="Rotate"] { display: none; }
"""
HINT = (
    "Drag to draw a box and type its name. **C** draws, **D** moves and resizes, **E** renames the chosen box, "
    "**Delete** removes it."
)
# A file from the browser to its own downloads, without a way through the server.
DOWNLOAD = """(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'scene.json';
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build_page(cfg: DictConfig, folder: Path) -> gr.Blocks:
    """The page, not yet served.

    Args:
        cfg: What `app.py` was asked for.
        folder: For the pictures.

    Returns:
        Gradio's blocks.

    Raises:
        ValueError: There is nothing to draw with, or the scene file is no scene.
    """
    found = {choice.title: choice for choice in choices(cfg)}
    scene = None if cfg.scene is None else _bounded(read_scene(cfg.scene), cfg.objects)
    hands = _Hands(cfg, folder, found)
    draft = Draft() if scene is None else Draft.of(scene)
    methods = [ANY, *dict.fromkeys(choice.method for choice in found.values())]
    first = next(iter(found.values()))
    usual = hands.usual(first.title)
    with gr.Blocks(title="Scenograph", fill_width=True, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        state, text = gr.State(draft), gr.Textbox(visible=False)
        with gr.Row():
            with gr.Column(min_width=SIDE + 48):
                caption = gr.Textbox(
                    "" if scene is None else scene.caption,
                    label="Caption of the whole picture",
                    max_length=LONGEST,
                    elem_id="caption",
                )
                canvas = image_annotator(
                    _canvas(draft),
                    label="Scene",
                    sources=[],
                    show_download_button=False,
                    show_share_button=False,
                    show_clear_button=False,
                    show_remove_button=True,
                    boxes_alpha=0.15,
                    box_min_size=8,
                    elem_id="canvas",
                )
                gr.Markdown(HINT)
                with gr.Row():
                    subject = gr.Dropdown(draft.names(), label="This", elem_id="subject")
                    predicate = gr.Dropdown(list(RELATIONS), label="is", allow_custom_value=True, elem_id="predicate")
                    target = gr.Dropdown(draft.names(), label="that", elem_id="target")
                relate = gr.Button("Add the relation", size="sm", elem_id="relate")
                relations = gr.CheckboxGroup(draft.sentences(), label="Relations", elem_id="relations")
                unrelate = gr.Button("Remove the ticked relations", size="sm")
                with gr.Row():
                    load = gr.UploadButton("Load a scene", file_types=[".json", ".txt", ".png"], elem_id="load")
                    save = gr.Button("Save the scene", elem_id="save")
            with gr.Column(min_width=440):
                with gr.Row():
                    method = gr.Dropdown(methods, value=ANY, label="Method", scale=1)
                    weights = gr.Dropdown(list(found), value=first.title, label="Weights", scale=3, elem_id="weights")
                other = gr.Dropdown(
                    [(NOTHING, ""), *found],
                    value="",
                    label="Compare with (the same scene, seed and settings)",
                    elem_id="other",
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                    guidance = gr.Slider(0, 20, usual[0], step=0.1, label="Guidance", elem_id="guidance")
                with gr.Row():
                    fraction = gr.Slider(0, 1, usual[1], step=0.05, label="β, share of steps with the scene")
                    steps = gr.Slider(1, 200, usual[2], step=1, label="Steps", elem_id="steps")
                go = gr.Button("Draw the picture", variant="primary", elem_id="draw")
                shown = []
                picture = {
                    "type": "filepath",
                    "format": "png",
                    "height": 280,
                    "interactive": False,
                    "buttons": ["download"],
                }
                with gr.Row():
                    for side in ("left", "right"):
                        with gr.Column(visible=side == "left", min_width=200) as column:
                            shown += [
                                column,
                                gr.Image(label="With boxes", elem_id=f"{side}_boxes", **picture),
                                gr.Image(label="Picture", elem_id=f"{side}_picture", elem_classes="pixels", **picture),
                                gr.Markdown(elem_id=f"{side}_about"),
                            ]
        settings = [guidance, fraction, steps]
        people = [state, subject, target, relations]
        edits = {
            "concurrency_id": "edits",
            "concurrency_limit": 1,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        draws = {"concurrency_id": "draws", "concurrency_limit": 1, "api_visibility": "private"}
        canvas.change(hands.follow, [canvas, state, subject, target], people, trigger_mode="always_last", **edits)
        relate.click(hands.relate, [canvas, state, subject, predicate, target], people, **edits)
        unrelate.click(hands.unrelate, [canvas, state, relations, subject, target], people, **edits)
        load.upload(hands.load, load, [canvas, caption, *people], **edits)
        save.click(hands.save, [canvas, state, caption], text, **edits).success(
            None, text, None, js=DOWNLOAD, api_visibility="private"
        )
        method.change(hands.of_method, method, weights, api_visibility="private")
        weights.change(hands.usual, weights, settings, api_visibility="private")
        go.click(hands.draw, [canvas, state, caption, weights, other, seed, *settings], shown, **draws)
    return page


def _said(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose refusals are shown in the page, in their one line."""

    @functools.wraps(handler)
    def run(*given: Any) -> Any:
        try:
            return handler(*given)
        except (ValueError, OSError) as error:
            message = explanation(error)
            if message is None:
                raise
            # Gradio shows HTML, and the message may quote a file of anyone's.
            raise gr.Error(html.escape(message, quote=False), duration=None, print_exception=False) from None

    return run


class _Hands:
    """The handlers.

    Args:
        cfg: What `app.py` was asked for.
        folder: For the pictures.
        found: The weights by title.
    """

    def __init__(self, cfg: DictConfig, folder: Path, found: dict[str, Choice]) -> None:
        self._most, self._folder, self._found = cfg.objects, folder, found
        self._painters = Painters(kept=cfg.kept)
        self._numbers = itertools.count()

    @_said
    def follow(self, canvas: Any, draft: Draft, subject: str | None, target: str | None) -> list[Any]:
        """After the canvas has changed: who can be related now."""
        return self._people(self._followed(canvas, draft), draft, subject, target)

    @_said
    def relate(
        self, canvas: Any, draft: Draft, subject: str | None, predicate: str | None, target: str | None
    ) -> list[Any]:
        """Adds a relation between the two that are chosen."""
        now = self._followed(canvas, draft)
        ends = [now.names().index(name) if name in now.names() else None for name in (subject, target)]
        if None in ends or not predicate:
            raise SceneError("relation: choose two boxes, and what the first is to the second")
        if len(now.relations) >= self._most**2 or len(predicate) > LONGEST:
            raise SceneError("relation: too many, or too long; remove one first")
        return self._people(now.related(ends[0], predicate, ends[1]), now, subject, target)  # type: ignore[arg-type]

    @_said
    def unrelate(
        self, canvas: Any, draft: Draft, ticked: Sequence[str], subject: str | None, target: str | None
    ) -> list[Any]:
        """Removes the relations that are ticked."""
        now = self._followed(canvas, draft)
        places = [place for place, sentence in enumerate(now.sentences()) if sentence in ticked]
        return self._people(now.without_relations(places), now, subject, target)

    @_said
    def load(self, file: str) -> list[Any]:
        """Puts the scene of a file on the canvas: one of the forms of `scenes.forms`, or a picture that has its scene in it."""
        name = Path(file).name
        try:
            if Path(file).suffix.lower() == ".png":
                scene = Scene.from_json(read_record(file).scene, where=name)
            else:
                scene = read_scene(file)
            draft = Draft.of(_bounded(scene, self._most))
        except ValueError as error:
            raise SceneError(str(error).replace(str(file), name)) from None
        return [_canvas(draft), scene.caption, *self._people(draft, draft, None, None)]

    @_said
    def save(self, canvas: Any, draft: Draft, caption: str) -> str:
        """The scene as the text of a file."""
        return json.dumps(self._followed(canvas, draft).made(caption).to_json(), indent=2, ensure_ascii=False) + "\n"

    def of_method(self, method: str) -> Any:
        """The weights of a method."""
        titles = [title for title, choice in self._found.items() if method in (ANY, choice.method)]
        return gr.Dropdown(titles, value=titles[0] if titles else None)

    @_said
    def usual(self, title: str) -> list[float]:
        """The settings that weights come with."""
        sampler = self._choice(title).run_cfg.sampler
        return [sampler.guidance, sampler.grounding_fraction, sampler.steps]

    @_said
    def draw(
        self,
        canvas: Any,
        draft: Draft,
        caption: str,
        title: str,
        other: str,
        seed: int,
        guidance: float,
        fraction: float,
        steps: int,
    ) -> list[Any]:
        """Draws the scene, and beside it with other weights where they are chosen."""
        scene = self._followed(canvas, draft).made(caption)
        sampler = {"guidance": guidance, "grounding_fraction": fraction, "steps": int(steps)}
        shown: list[Any] = []
        for name in (title, other):
            if not name:
                shown += [gr.Column(visible=False), None, None, ""]
                continue
            with self._painters.lock:
                painter = self._painters.of(self._choice(name))
                picture = painter.paint([scene], seed=int(seed), sampler=sampler)[0]
            record = painter.record(scene, sampler=sampler, form="picture", seeds=[int(seed)], paste_back=False)
            plain, boxed = self._files()
            save_picture(Image.fromarray(picture), plain, record)
            draw_boxes(Image.fromarray(picture), scene).save(boxed)
            shown += [
                gr.Column(visible=True),
                str(boxed),
                str(plain),
                f"{name}, {record.settings['checkpoint'] or 'file'}",
            ]
        return shown

    def _choice(self, title: str) -> Choice:
        if title not in self._found:
            raise ValueError(f"weights={title}: not among those of this page; choose one of the list")
        return self._found[title]

    def _followed(self, canvas: Any, draft: Draft) -> Draft:
        boxes = [] if canvas is None else canvas["boxes"]
        if len(boxes) > self._most:
            raise SceneError(
                f"objects: {len(boxes)}, more than objects={self._most}; remove some, or raise it with app.py"
            )
        if any(len(str(box["label"])) > LONGEST for box in boxes):
            raise SceneError(f"objects: a name is longer than {LONGEST} characters; shorten it")
        return draft.followed(boxes)

    def _people(self, draft: Draft, before: Draft, subject: str | None, target: str | None) -> list[Any]:
        """The draft, whom one can choose, and the relations; whoever was chosen stays chosen under a new name or number."""
        was, now = before.names(), draft.names()
        ends = [was.index(name) if name in was else None for name in (subject, target)]
        if len(was) == len(now):
            values = [None if end is None else now[end] for end in ends]
        else:
            values = [name if name in now else None for name in (subject, target)]
        return [
            draft,
            *(gr.Dropdown(now, value=value) for value in values),
            gr.CheckboxGroup(draft.sentences(), value=[]),
        ]

    def _files(self) -> tuple[Path, Path]:
        """Names for a picture and the one with boxes; the oldest ones go."""
        self._folder.mkdir(exist_ok=True)
        number = next(self._numbers)
        for kind in ("picture", "boxes"):
            (self._folder / f"{kind}_{number - PICTURES}.png").unlink(missing_ok=True)
        return self._folder / f"picture_{number}.png", self._folder / f"boxes_{number}.png"


def _canvas(draft: Draft) -> dict[str, Any]:
    """What the canvas shows: white with a grid of tenths, and the draft's boxes."""
    paper = np.full((SIDE, SIDE, 3), 255, np.uint8)
    lines = np.linspace(0, SIDE - 1, 11).round().astype(int)
    paper[lines] = paper[:, lines] = 232
    return {"image": paper, "boxes": draft.boxes()}


def _bounded(scene: Scene, most: int) -> Scene:
    if len(scene.objects) > most:
        raise SceneError(
            f"scene {scene.id!r}: {len(scene.objects)} objects, more than objects={most}; raise it with app.py"
        )
    return scene
