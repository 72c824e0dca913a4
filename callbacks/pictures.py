"""Pictures during training: the true one, one drawn with the scene and one without, side by side with the boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from models.sampling import to_uint8
from scenes import SceneBatch
from scenes.draw import draw_boxes, grid


class Pictures(pl.Callback):
    """Draws the same held-out scenes every so many steps, from the averaged weights.

    Args:
        folder: where `step=<step>.png` go.
        every: optimizer steps between pictures.
        scenes: how many scenes.
        seed: of the start latents.
    """

    def __init__(self, *, folder: str, every: int, scenes: int = 6, seed: int = 0) -> None:
        self.folder, self.every, self.scenes, self.seed = Path(folder), every, scenes, seed

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Draws on the steps that are due."""
        step = trainer.global_step
        due = step % self.every == 0 and trainer.fit_loop.epoch_loop._should_accumulate() is False
        if due and trainer.is_global_zero:
            self._draw(trainer, pl_module, step)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        held_out = trainer.datamodule.held_out(self.scenes).to(module.device)
        null = held_out.scenes.drop(torch.zeros(len(held_out), dtype=torch.bool))
        with module.averaged(), torch.no_grad():
            drawn = module.sample(held_out.scenes, seed=self.seed)
            bare = module.sample(null, seed=self.seed) if module.conditioning.adapters else None
            true = held_out.images if held_out.images is not None else module.backbone.decode(held_out.latents)
        columns = {"true": true, "drawn": drawn}
        if bare is not None:
            columns = {"true": true, "with the scene": drawn, "without": bare}
        sheet = _sheet(columns, held_out.scenes)
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self.folder / f"step={step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("pictures", np.asarray(sheet), step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("pictures", [sheet], step=step)


def _sheet(columns: dict[str, torch.Tensor], scenes: SceneBatch) -> Image.Image:
    pictures = [[Image.fromarray(image) for image in to_uint8(images)] for images in columns.values()]
    rows = [
        [draw_boxes(cell, scene) for cell in row]
        for row, scene in zip(zip(*pictures, strict=True), scenes, strict=True)
    ]
    return grid(rows, titles=list(columns))
