"""What `sample.py` does once its configuration is checked: read the scene, draw it under each seed, save one sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from evaluation.generation import NOT_REFINED
from models.inpainting import as_image
from models.sampling import to_uint8
from runtime.build import build_refiner
from runtime.device import device_of, placed
from runtime.restoring import load_module
from scenes import Scene, SceneBatch
from scenes.draw import draw_boxes, draw_graph, grid
from scenes.forms import read_scene

SHEET = "sample.png"


def draw(cfg: DictConfig, run_cfg: DictConfig) -> Path:
    """Saves a sheet: the scene's graph, then for each seed the picture with its boxes, plain, and without the scene.

    With `inpaint` the last column is the given picture. With a refiner the sheet has refined pictures, and a second
    one beside it, `<out>_non_refined`, the same pictures before.

    Args:
        cfg: what `sample.py` was asked for: `scene`, the scene file in any of the forms of `scenes.forms`; `caption`, in
            place of its own; `seeds`, one row each; `out`, the sheet's file, sample.png if not given; `inpaint`, a picture
            that is kept outside the boxes, and `paste_back`, its pixels as they were;
            `refiner`, what refines the pictures.
        run_cfg: the run's own configuration; its newest checkpoint draws.

    Returns:
        The sheet's file.

    Raises:
        SceneError: the scene file is not a scene; the field is named.
        ValueError: `inpaint` is no picture, or `paste_back` without it, or both it and a refiner.
    """
    if cfg.inpaint is not None and cfg.refiner is not None:
        raise ValueError(
            f"refiner: it paints the whole of a picture, and inpaint={cfg.inpaint} keeps a part; leave one out"
        )
    scene = read_scene(cfg.scene)
    if cfg.caption is not None:
        scene = replace(scene, caption=cfg.caption)
    device_of(run_cfg.trainer)  # refuses before the weights are read
    refiner = build_refiner(cfg)
    module, _ = load_module(run_cfg, None)
    given = None if cfg.inpaint is None else _given(cfg.inpaint, (module.backbone.resolution,) * 2)
    titles = ["scene graph", "with boxes", "picture", "without the scene" if given is None else "the given picture"]
    sheets: dict[str, list[list[Image.Image]]] = {"": []} if refiner is None else {"": [], NOT_REFINED: []}
    for seed in cfg.seeds:
        scenes = [scene, scene.without_layout()] if given is None else [scene]
        with placed(module, run_cfg.trainer), module.averaged(), torch.no_grad():
            batch = SceneBatch(scenes, device=module.device)
            pictures = to_uint8(module.sample(batch, seed=seed, inpaint=given, paste_back=cfg.paste_back))
        drawn = [*pictures] if given is None else [*pictures, *to_uint8(given)]
        if refiner is not None:
            sheets[NOT_REFINED].append(_row(scene, drawn))
            refiner.to(module.device)
            drawn = [refiner(picture, shown, seed=seed) for picture, shown in zip(drawn, scenes, strict=True)]
        sheets[""].append(_row(scene, drawn))
    out = Path(cfg.out or SHEET)
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, rows in sheets.items():
        grid(rows, titles=titles).save(out.with_stem(out.stem + suffix))
    return out


def _row(scene: Scene, pictures: list[np.ndarray]) -> list[Image.Image]:
    """A sheet's row: the graph, the picture with boxes and plain, and the picture beside it; pictures (H, W, 3) uint8."""
    with_scene, beside = (Image.fromarray(picture) for picture in pictures)
    drawn = draw_boxes(with_scene, scene)
    plain = [picture.resize(drawn.size, Image.Resampling.NEAREST) for picture in (with_scene, beside)]
    return [draw_graph(scene, size=drawn.size), drawn, *plain]


def _given(path: str, size: tuple[int, int]) -> Tensor:
    """The picture of a file as (1, 3, H, W) in [-1, 1]; size is (H, W)."""
    try:
        with Image.open(path) as picture:
            return as_image(picture, size)[None]
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"inpaint: {path} is no picture that can be read ({error}); give a PNG or JPEG") from None
