"""The shared training step: encode, drop conditions, adapt, draw time and noise, corrupt, denoise, loss.

Nothing here names a backbone, a method or a data set. What only a method knows lives on its adapter; files beside this
one hold one thin LightningModule for each method.

Legend: B pictures, (C, h, w) a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.scene_datamodule import Batch
from lightning_modules.averaging import MovingAverage
from lightning_modules.schedules import learning_rate_factor
from models.backbones.base import INPAINTS, Backbone
from models.conditioning.base import Conditioning
from models.conditioning.drops import ConditionDrops
from models.objectives import DiffusionObjective, draw
from models.sampling import Sampler
from scenes import SceneBatch

VALIDATION_KEY = 2**63
"""Added to a scene's place in the validation split, so that its fixed draws are nobody's in training."""


class SceneDiffusion(pl.LightningModule):
    """Trains adapters over a frozen backbone, or a backbone by itself where there is no adapter.

    Args:
        backbone: the diffusion model.
        conditioning: the adapters; attached to the backbone's UNet here.
        objective: noise levels, target and weight.
        drops: which conditions a sample keeps.
        optimizer: parameters -> optimizer.
        schedule: arguments of `learning_rate_factor` beside `steps`.
        sampler: draws pictures for callbacks and evaluation.
        average: settings of `MovingAverage`; None for no average.
        seed: with a sample's global position it decides the sample's noise.
        max_nonfinite: batches with a non-finite loss that are left out (and counted) before the run stops.
        channels_last: keep the UNet and its input in channels-last memory.
        compiled: compile the UNet in place; keys stay as they are.
        checkpointing: compute activations of the UNet's blocks again in the backward pass.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        conditioning: Conditioning,
        objective: DiffusionObjective,
        drops: ConditionDrops,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Mapping[str, Any],
        sampler: Sampler,
        average: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_nonfinite: int = 0,
        channels_last: bool = False,
        compiled: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapters = conditioning.adapters  # registered here, so that checkpoint keys are adapters.<name>.*
        self._conditioning = (conditioning,)
        self.objective, self.drops, self.sampler = objective, drops, sampler
        self._optimizer, self._schedule = optimizer, dict(schedule)
        self.seed, self.max_nonfinite, self.nonfinite = seed, max_nonfinite, 0
        if self.adapters:
            backbone.freeze()
            conditioning.attach(backbone.unet)
        else:
            backbone.requires_grad_(True)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        backbone.unet.to(memory_format=self._format)
        if checkpointing:
            backbone.unet.enable_gradient_checkpointing()
        if compiled:
            backbone.unet.compile()
        if unknown := sorted(set(drops.methods) - set(self.adapters)):
            raise ValueError(
                f"drops.methods.{unknown[0]}: no method of this run (have: {', '.join(sorted(self.adapters))}); name one of them"
            )
        self.average = MovingAverage(self.trained, **average) if average else None
        self.strict_loading = False  # frozen weights are not in a checkpoint; on_load_checkpoint verifies the rest

    @property
    def conditioning(self) -> Conditioning:
        """The adapters as one."""
        return self._conditioning[0]

    @property
    def trained(self) -> nn.Module:
        """What trains, is averaged and is saved: the adapters, or the backbone where there are none."""
        return self.conditioning if self.adapters else self.backbone

    def on_fit_start(self) -> None:
        """Refuses a denoiser that wants a picture to inpaint: training data has none."""
        if self.backbone.inpaints:
            raise ValueError(f"backbone: {INPAINTS}")

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean loss of B samples; what happens to a sample is a function of (seed, its global position)."""
        parts = self.parts(batch, batch.positions.tolist())
        losses = torch.stack(list(parts.values())).sum(dim=0)
        loss = losses.mean()
        for name in list(parts)[1:]:
            self.log(f"train/{name}", parts[name].detach().mean(), batch_size=len(losses))
        self.log("train/loss", loss.detach(), batch_size=len(losses))  # NaN too: else the value before is logged again
        return loss if torch.isfinite(loss) else self._left_out(batch, losses)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss with noise level and noise fixed for each scene, and no condition dropped."""
        losses = self.losses(batch, [VALIDATION_KEY + p for p in batch.positions.tolist()], drop=False)
        self.log("validation/loss", losses.mean(), batch_size=len(losses), on_epoch=True, sync_dist=True)

    def losses(self, batch: Batch, keys: list[int], *, drop: bool = True) -> Tensor:
        """(B,) losses of the samples whose draws are those of `keys`."""
        return torch.stack(list(self.parts(batch, keys, drop=drop).values())).sum(dim=0)

    def parts(self, batch: Batch, keys: list[int], *, drop: bool = True) -> dict[str, Tensor]:
        """What the losses are the sum of: the objective's (B,) first, then those that methods have of their own, by name."""
        latents = self.latents(batch).contiguous(memory_format=self._format)
        draws = draw(self.seed, keys, latents.shape[1:], methods=len(self.drops.methods)).to(latents.device)
        given: dict[str, Any] = {}
        scenes, captions = batch.scenes, batch.scenes.captions
        if drop:
            scenes, captions, has_caption = self.drops(scenes, draws.keep)
            given = {"kept": self.drops.zeroed(has_caption), "seen": self.drops.seen(scenes, draws.methods)}
        inputs = self.conditioning(self.backbone, scenes, captions, tuple(latents.shape[-2:]), **given)
        times, noise = self.objective.times(draws), self.objective.noise(draws)
        noised = self.objective.corrupt(latents, noise, times).contiguous(memory_format=self._format)
        prediction = self.backbone.denoise(noised, times, inputs)
        return {
            "objective": self.objective.losses(prediction, latents, noise, times),
            **self.conditioning.losses(inputs),
        }

    def latents(self, batch: Batch) -> Tensor:
        """(B, C, h, w) latents: those that the batch brings, or of its pictures."""
        if batch.latents is None:
            return self.backbone.encode_images(batch.images)
        self.backbone.check_latents(tuple(batch.latents.shape[1:]))
        return batch.latents

    def _left_out(self, batch: Batch, losses: Tensor) -> Tensor:
        """A loss of 0 in place of one that is not finite, as often as the settings allow.

        Args:
            batch: B samples; those with a loss that is not finite are named by their scene's id.
            losses: (B,) their losses, at least one of them not finite.

        Returns:
            A scalar 0 that depends on every trained parameter, so that each gets a gradient of 0 on every rank.

        Raises:
            FloatingPointError: once too often; the samples are named.
        """
        self.nonfinite += 1
        places = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        names = ", ".join(batch.scenes.scenes[place].id for place in places)
        message = f"the loss at step {self.global_step} is not finite for the scenes {names}"
        if self.nonfinite > self.max_nonfinite:
            raise FloatingPointError(
                f"{message} (batch {self.nonfinite} of this kind, trainer.max_nonfinite={self.max_nonfinite}); look at "
                "these scenes, lower optimizer.learning_rate, or raise trainer.max_nonfinite to leave such batches out"
            )
        rank_zero_warn(f"{message}; the batch is left out, number {self.nonfinite} of {self.max_nonfinite}")
        return sum((p * 0).sum() for p in self.trained.parameters() if p.requires_grad)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over what trains, its learning rate a function of the optimizer step."""
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        optimizer = self._optimizer(parameters)
        factor = learning_rate_factor(steps=self.trainer.max_steps, **self._schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then takes the new weights into the average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.trained)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the adapters have their averaged weights and everything is in evaluation mode."""
        training = self.training
        self.eval()
        try:
            with self.average.swapped_into(self.trained) if self.average is not None else nullcontext():
                yield
        finally:
            self.train(training)

    def sample(self, scenes: SceneBatch, *, seed: int, **given: Any) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B scenes, from the present weights; `given` as `Sampler.__call__` has it."""
        return self.sampler(self.backbone, self.conditioning, scenes, seed=seed, **given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen weights out and notes what the adapters belong to."""
        kept = self._saved_keys()
        checkpoint["state_dict"] = {key: checkpoint["state_dict"][key] for key in kept}
        checkpoint["belongs_to"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Verifies that what is missing from the checkpoint is exactly the frozen part.

        Args:
            checkpoint: what Lightning read: `state_dict`, and `belongs_to` as `on_save_checkpoint` noted it.

        Raises:
            ValueError: a checkpoint of another method or backbone, or with missing or unexpected keys or other shapes.
        """
        own, other = self._identity(), checkpoint.get("belongs_to")
        if other is not None and other != own:
            name = next(name for name in own if own[name] != other.get(name))
            raise ValueError(
                f"checkpoint: its {name} is {other.get(name)}, this run's is {own[name]}; "
                f"give a checkpoint of this {name} or another run=DIR"
            )
        stored, kept = set(checkpoint["state_dict"]), set(self._saved_keys())
        for kind, keys in (("misses", kept - stored), ("has unexpected", stored - kept)):
            if keys:
                raise ValueError(
                    f"checkpoint: {kind} {len(keys)} keys, first {min(keys)}; give a checkpoint of this run"
                )
        weights = self.state_dict()
        for key in self._saved_keys():
            shapes = tuple(checkpoint["state_dict"][key].shape), tuple(weights[key].shape)
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"checkpoint: {key} is {shapes[0]}, this run's is {shapes[1]}; set the method as in that run"
                )

    def _saved_keys(self) -> list[str]:
        prefixes = ("adapters." if self.adapters else "backbone.", "average.")
        return [key for key in self.state_dict() if key.startswith(prefixes)]

    def _identity(self) -> dict[str, Any]:
        return {
            "conditioning": sorted(self.adapters),
            "backbone": [
                type(self.backbone).__name__,
                self.backbone.latent_channels,
                self.backbone.text_width,
            ],
        }
