"""What `sample.py` does once its configuration is checked: read the scene, draw it under each seed, save one sheet."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image

from models.sampling import to_uint8
from runtime.device import device_of, placed
from runtime.evaluation import load_module
from scenes import SceneBatch, load_scene
from scenes.draw import draw_boxes, draw_graph, grid


def draw(cfg: DictConfig, run_cfg: DictConfig) -> None:
    """Saves a sheet: the scene's graph, then for each seed the picture with its boxes, plain, and without the scene.

    Args:
        cfg: what `sample.py` was asked for: `scene`, the scene file; `seeds`, one row each; `out`, the sheet's file.
        run_cfg: the run's own configuration; its newest checkpoint draws.

    Raises:
        SceneError: the scene file is not a scene; the field is named.
    """
    scene = load_scene(cfg.scene)
    device_of(run_cfg.trainer)  # refuses before the weights are read
    module, _ = load_module(run_cfg, None)
    titles = ["scene graph", "with boxes", "picture", "without the scene"]
    rows = []
    for seed in cfg.seeds:
        with placed(module, run_cfg.trainer), module.averaged(), torch.no_grad():
            pair = SceneBatch([scene, scene.without_layout()], device=module.device)
            with_scene, without = (Image.fromarray(image) for image in to_uint8(module.sample(pair, seed=seed)))
        drawn = draw_boxes(with_scene, scene)
        plain = [picture.resize(drawn.size, Image.Resampling.NEAREST) for picture in (with_scene, without)]
        rows.append([draw_graph(scene, size=drawn.size), drawn, *plain])
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    grid(rows, titles=titles).save(cfg.out)
