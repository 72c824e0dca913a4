"""What `sample.py` does once its configuration is checked: read the scene, draw it, save one PNG with all settings in it.

The picture is a sheet (seeds below one another, with the scene's graph, boxes, and the caption alone beside), a grid over seeds
and guidances, or a picture by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from models.inpainting import as_image
from models.sampling import to_uint8
from runtime.build import build_refiner
from sampling.generation import NOT_REFINED
from sampling.image_record import file_hash, save_picture
from sampling.painter import Painter
from sampling.reproduce import Again
from scenes import Scene
from scenes.draw import draw_boxes, draw_graph, draw_layout, enlarged, grid
from scenes.forms import read_scene

SHEET = "sample.png"
PROMPT = "prompt"  # id of a scene from the command line: the noise of a seed is the same for all of them


def draw(cfg: DictConfig, run_cfg: DictConfig, again: Again | None = None) -> Path:
    """Saves a picture of a scene; with a refiner a second one beside it, `<out>_non_refined`, as it was before.

    Args:
        cfg: what `sample.py` was asked for: `scene`, the scene file in any of the forms of `scenes.forms`, or `phrases` and
            `boxes`; `caption`, in place of its own; `seeds` and `guidances`; `form`; `out`, the file, sample.png if not given;
            `inpaint`, a picture that is kept outside the boxes, and `paste_back`, its pixels as they were; `refiner`.
        run_cfg: what draws: the run's own configuration, or that of a file of weights.
        again: the picture that is made again; None for a new one.

    Returns:
        The file.

    Raises:
        SceneError: the scene file is not a scene; the field is named.
        ValueError: `inpaint` is no picture, or `paste_back` without it, or both it and a refiner; or the weights that drew the
            picture have changed.
    """
    if cfg.inpaint is not None and cfg.refiner is not None:
        raise ValueError(
            f"refiner: it paints the whole of a picture, and inpaint={cfg.inpaint} keeps a part; leave one out"
        )
    scene = _scene_of(cfg, again)
    refiner = build_refiner(cfg)
    painter = Painter(run_cfg, checkpoint=cfg.checkpoint)
    if again is not None and again.weights_sha256 not in (None, painter.weights_sha256):
        raise ValueError(
            f"again={cfg.again}: {painter.name} has other weights now than those that drew it; name theirs with checkpoint=FILE, "
            f"or draw with these with {'run' if cfg.weights is None else 'weights'}={painter.name}"
        )
    form = cfg.form or ("sheet" if cfg.guidances is None else "grid")
    seeds, guidances = list(cfg.seeds or [0]), None if cfg.guidances is None else list(cfg.guidances)
    given = None if cfg.inpaint is None else _given(cfg.inpaint, (painter.resolution,) * 2)
    kept = {"inpaint": given, "paste_back": bool(cfg.paste_back)}
    shown = [scene, scene.without_layout()] if form == "sheet" and given is None else [scene]
    beside = [] if given is None or form != "sheet" else [*to_uint8(given)]
    rows: dict[str, list[list[np.ndarray]]] = {"": []} if refiner is None else {"": [], NOT_REFINED: []}
    for seed in seeds:
        samplers = [{"guidance": guidance} for guidance in guidances] if guidances else [{}]
        drawn = [
            picture for sampler in samplers for picture in painter.paint(shown, seed=seed, sampler=sampler, **kept)
        ]
        if refiner is not None:
            rows[NOT_REFINED].append(drawn)
            refiner.to(painter.module.device)
            drawn = [refiner(picture, shown[n % len(shown)], seed=seed) for n, picture in enumerate(drawn)]
        rows[""].append([*drawn, *beside])
    asked = {
        "form": form,
        "seeds": seeds,
        "guidances": guidances,
        "inpaint": cfg.inpaint,
        "paste_back": bool(cfg.paste_back),
    }
    kept_hash = None if cfg.inpaint is None else file_hash(cfg.inpaint)
    columns = [f"guidance {guidance:g}" for guidance in guidances or [run_cfg.sampler.guidance]]
    out = Path(cfg.out or SHEET)
    for suffix, pictures in rows.items():
        refined = None if suffix == NOT_REFINED else cfg.refiner
        record = painter.record(scene, inpaint_sha256=kept_hash, refiner=refined, **asked)
        if form == "picture":
            whole = Image.fromarray(pictures[0][0])
        elif form == "grid":
            whole = _grid(scene, pictures, rows=[f"seed {seed}" for seed in seeds], columns=columns)
        else:
            last = "the given picture" if beside else "without the scene"
            titles = ["scene graph", "with boxes", "picture", last]
            whole = grid([_row(scene, row) for row in pictures], titles=titles)
        save_picture(whole, out.with_stem(out.stem + suffix), record)
    return out


def _scene_of(cfg: DictConfig, again: Again | None) -> Scene:
    """The scene of a file, of the command line, or of the picture that is made again; with the caption that was given."""
    if cfg.phrases is not None:
        boxes = OmegaConf.to_container(cfg.boxes)
        objects = [{"phrase": phrase, "box": box} for phrase, box in zip(cfg.phrases, boxes, strict=True)]
        scene = Scene.from_json({"id": PROMPT, "objects": objects}, where="phrases, boxes")
    elif cfg.scene is not None or again is None:
        scene = read_scene(cfg.scene)
    else:
        scene = Scene.from_json(again.record.scene, where=f"again={cfg.again}")
    return scene if cfg.caption is None else replace(scene, caption=cfg.caption)


def _grid(scene: Scene, pictures: list[list[np.ndarray]], *, rows: list[str], columns: list[str]) -> Image.Image:
    """The boxes, and beside them a row for each seed and a column for each guidance; pictures (H, W, 3) uint8."""
    cells = [[enlarged(Image.fromarray(picture)) for picture in row] for row in pictures]
    layout = draw_layout(scene, size=cells[0][0].size)
    return grid([[layout, *row] for row in cells], titles=["the scene", *columns], sides=rows)


def _row(scene: Scene, pictures: list[np.ndarray]) -> list[Image.Image]:
    """A sheet's row: the graph, the picture with boxes and plain, and the picture beside it; pictures (H, W, 3) uint8."""
    with_scene, beside = (Image.fromarray(picture) for picture in pictures)
    drawn = draw_boxes(with_scene, scene)
    return [draw_graph(scene, size=drawn.size), drawn, enlarged(with_scene), enlarged(beside)]


def _given(path: str, size: tuple[int, int]) -> Tensor:
    """The picture of a file as (1, 3, H, W) in [-1, 1]; size is (H, W)."""
    try:
        with Image.open(path) as picture:
            return as_image(picture, size)[None]
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"inpaint: {path} is no picture that can be read ({error}); give a PNG or JPEG") from None
