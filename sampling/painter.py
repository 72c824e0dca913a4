"""Trained weights that draw scenes one after another, and what a picture of theirs says of itself.

Which scenes, and what becomes of the pictures, is decided in `sample.py` and `web`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from models.sampling import to_uint8
from runtime.launch.device import device_of, placed
from runtime.restoring import load_module, weights_hash
from sampling.image_record import PictureRecord, made_with
from sampling.reproduce import recorded_settings
from scenes import Scene, SceneBatch


class Painter:
    """The weights of a run, or of a file, with the settings that they draw with.

    Args:
        run_cfg: Of the run, as `restored_config` gives it.
        checkpoint: A file of the run's; None takes the newest.

    Attributes:
        module: What draws.
        weights_sha256: Hash over all its weights.

    Raises:
        ValueError: There are no such weights, or they do not fit; no such device.
    """

    def __init__(self, run_cfg: DictConfig, *, checkpoint: str | None = None) -> None:
        self._device = device_of(run_cfg.trainer)  # refuses before the weights are read
        self.run_cfg = run_cfg
        self.module, self._file = load_module(run_cfg, checkpoint)
        self.weights_sha256 = weights_hash(self.module)

    @property
    def name(self) -> str:
        """The run, or the file with the weights."""
        return str(self.run_cfg.run)

    @property
    def resolution(self) -> int:
        """Height and width of the pictures, px."""
        return self.module.backbone.resolution

    def paint(
        self, scenes: Sequence[Scene], *, seed: int, sampler: Mapping[str, Any] | None = None, **given: Any
    ) -> np.ndarray:
        """Pictures of scenes, drawn as one batch.

        Args:
            scenes: B scenes.
            seed: With a scene's id it decides the noise.
            sampler: Settings of the sampler over the run's own, such as `guidance`.
            **given: As `Sampler.__call__` has it: `inpaint`, a (B, 3, H, W) tensor, and `paste_back`.

        Returns:
            (B, H, W, 3) uint8.

        Raises:
            ValueError: A setting out of its range.
        """
        draws = instantiate(self._sampler(sampler), _convert_="all")
        with placed(self.module, self.run_cfg.trainer), self.module.averaged(), torch.no_grad():
            batch = SceneBatch(scenes, device=self.module.device)
            return to_uint8(draws(self.module.backbone, self.module.conditioning, batch, seed=seed, **given))

    def record(
        self, scene: Scene, *, sampler: Mapping[str, Any] | None = None, inpaint_sha256: str | None = None, **asked: Any
    ) -> PictureRecord:
        """What a picture says of itself.

        Args:
            scene: What was drawn.
            sampler: As `paint` had it.
            inpaint_sha256: Of the file that was kept outside the boxes.
            **asked: As `recorded_settings` takes them: `form`, `seeds` and the like.

        Returns:
            The record.
        """
        file = self.run_cfg.get("weights_file")
        named = {"weights": file} if file is not None else {"run": self.name, "checkpoint": self._file.name}
        settings = recorded_settings(self.run_cfg, sampler=self._sampler(sampler), **named, **asked)
        return PictureRecord(
            scene=scene.to_json(),
            settings=settings,
            weights_sha256=self.weights_sha256,
            inpaint_sha256=inpaint_sha256,
            made_with=made_with(str(self._device)),
        )

    def _sampler(self, over: Mapping[str, Any] | None) -> DictConfig:
        merged = OmegaConf.merge(self.run_cfg.sampler, dict(over or {}))
        assert isinstance(merged, DictConfig)
        return merged
