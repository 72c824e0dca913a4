"""Pictures during training: the true one, one drawn with the scene and one without, side by side with the boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from callbacks.observer import HeldOutObserver
from callbacks.sharing import shared
from models.sampling import to_uint8
from scenes import Scene
from scenes.draw import draw_boxes, grid


class Pictures(HeldOutObserver):
    """Draw the same held-out scenes every so many steps, from the averaged weights; all ranks draw, each its share.

    Args:
        folder: where `step=<step>.png` go.
        every: optimizer steps between pictures.
        scenes: how many scenes.
        seed: of the start latents.
        at_once: scenes that a rank draws at once.
    """

    def __init__(self, *, folder: str, every: int, scenes: int = 6, seed: int = 0, at_once: int = 2) -> None:
        super().__init__(every=every)
        self.folder, self.scenes, self.seed, self.at_once = Path(folder), scenes, seed, at_once

    def observe(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Draw, and write the sheet."""
        rows = shared(
            trainer,
            pl_module,
            lambda held_out: self._drawn(pl_module, held_out),
            scenes=self.scenes,
            at_once=self.at_once,
        )
        if trainer.is_global_zero:
            self._keep(trainer, _sheet(rows), step)

    def _drawn(self, module: Any, held_out: Any) -> list[tuple[Scene, dict[str, np.ndarray]]]:
        """Return of each scene its pictures (H, W, 3) uint8 by the title of their column."""
        true = held_out.images if held_out.images is not None else module.backbone.decode(held_out.latents)
        drawn = module.sample(held_out.scenes, seed=self.seed)
        columns = {"true": true, "drawn": drawn}
        if module.conditioning.adapters:
            null = held_out.scenes.drop(torch.zeros(len(held_out), dtype=torch.bool))
            columns = {"true": true, "with the scene": drawn, "without": module.sample(null, seed=self.seed)}
        pictures = [to_uint8(images) for images in columns.values()]
        return [
            (scene, dict(zip(columns, row, strict=True)))
            for scene, *row in zip(held_out.scenes, *pictures, strict=True)
        ]

    def _keep(self, trainer: pl.Trainer, sheet: Image.Image, step: int) -> None:
        """Write a sheet, and give it to the loggers that show pictures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self.folder / f"step={step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("pictures", np.asarray(sheet), step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("pictures", [sheet], step=step)


def _sheet(rows: list[tuple[Scene, dict[str, np.ndarray]]]) -> Image.Image:
    """Return a row for each scene, its boxes drawn over each picture."""
    cells = [[draw_boxes(Image.fromarray(image), scene) for image in row.values()] for scene, row in rows]
    return grid(cells, titles=list(rows[0][1]))
