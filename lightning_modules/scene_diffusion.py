"""The shared training step: encode, drop conditions, adapt, draw time and noise, corrupt, denoise, loss.

Nothing here names a backbone, a method or a data set. What only a method knows lives on its adapter; files beside this
one hold one thin LightningModule for each method.

Legend: B pictures, (C, h, w) a latent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.order import latent_noise
from datamodules.scene_datamodule import Batch
from lightning_modules.execution import Execution
from lightning_modules.guard import MicroBatch, Verdict, gathered, judge, ranks, rewind, told
from lightning_modules.optimization import Optimization
from models.backbones.base import INPAINTS, Backbone
from models.conditioning.base import Conditioning
from models.conditioning.drops import ConditionDrops
from models.objectives import DiffusionObjective, draw
from models.sampling import Sampler
from scenes import SceneBatch

VALIDATION_KEY = 2**63
"""Added to a scene's place in the validation split, so that its fixed draws are nobody's in training."""
NONFINITE = "nonfinite.jsonl"
"""In the run's folder: a line for each sample of a step that was left out because a loss or a gradient was not finite."""
NAMED = 8  # scenes in a message; the file has all


class SceneDiffusion(pl.LightningModule):
    """Train adapters over a frozen backbone, or a backbone by itself where there is no adapter.

    Args:
        backbone: the diffusion model.
        conditioning: the adapters; attached to the backbone's UNet here.
        objective: noise levels, target and weight.
        drops: which conditions a sample keeps.
        optimization: optimizer, learning rate, average, and steps that are left out.
        sampler: draws pictures for callbacks and evaluation.
        execution: how the UNet is computed; None takes all defaults.
        seed: with a sample's global position it decides the sample's noise.
        posterior: what training takes of an image: "sample" draws its latent from the autoencoder's distribution, "mode" takes
            the mean, as validation does.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        conditioning: Conditioning,
        objective: DiffusionObjective,
        drops: ConditionDrops,
        optimization: Optimization,
        sampler: Sampler,
        execution: Execution | None = None,
        seed: int = 0,
        posterior: str = "mode",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapters = conditioning.adapters  # registered here, so that checkpoint keys are adapters.<name>.*
        self._conditioning = (conditioning,)
        self.objective, self.drops, self.sampler = objective, drops, sampler
        self.optimization, self.execution = optimization, execution or Execution()
        self.seed, self.posterior, self.nonfinite = seed, posterior, 0
        self._done: list[MicroBatch] = []
        self._is_left_out = False
        self._bad_samples = 0
        if self.adapters:
            backbone.freeze()
            conditioning.attach(backbone.unet)
        else:
            backbone.requires_grad_(True)
        self.execution.apply(backbone.unet)
        if unknown := sorted(set(drops.methods) - set(self.adapters)):
            raise ValueError(
                f"drops.methods.{unknown[0]}: no method of this run (have: {', '.join(sorted(self.adapters))}); name one of them"
            )
        self.average = optimization.build_average(self.trained)
        self.strict_loading = False  # frozen weights are not in a checkpoint; on_load_checkpoint verifies the rest

    @property
    def conditioning(self) -> Conditioning:
        """The adapters as one."""
        return self._conditioning[0]

    @property
    def trained(self) -> nn.Module:
        """The part that trains, is averaged and is saved: the adapters, or the backbone where there are none."""
        return self.conditioning if self.adapters else self.backbone

    def on_fit_start(self) -> None:
        """Reject a denoiser that needs an image to inpaint, which training data lacks, and one that would train in half.

        Raises:
            ValueError: either.
        """
        if self.backbone.inpaints:
            raise ValueError(f"backbone: {INPAINTS}")
        if (
            not self.adapters
            and self.backbone.unet.dtype != torch.float32
            and "16-true" not in str(self.trainer.precision)
        ):
            raise ValueError(
                f"backbone.dtype: {self.backbone.unet.dtype}, but without an adapter the backbone itself trains, whose small "
                "steps half precision loses; set backbone.dtype=float32"
            )

    def on_train_start(self) -> None:
        """Drop what an attempt before this one wrote of steps that come again."""
        self._done.clear()
        if self.trainer.is_global_zero:
            rewind(self._nonfinite_file, self.global_step)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the mean loss of B samples; what happens to a sample is a function of (seed, its global position)."""
        positions = batch.positions.tolist()
        parts = self.parts(batch, positions)
        ids = [scene.id for scene in batch.scenes]
        detached = {name: losses.detach() for name, losses in parts.items()}
        self._done.append(MicroBatch(ids=ids, positions=positions, parts=detached, bad=len(batch.faults)))
        return torch.stack(list(parts.values())).sum(dim=0).mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the mean loss over all ranks and micro-batches; leave the step out, on all ranks, where something is not finite.

        Args:
            optimizer: about to step; without gradients it changes neither a weight nor its own state.

        Raises:
            FloatingPointError: a loss or a gradient is not finite, once too often in a row; the samples are named.
        """
        trained = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        verdict = judge(self._done, (p.grad for p in trained if p.grad is not None))
        done, self._done = self._done, []
        for name, value in verdict.means.items():
            self.log(f"train/{name}", value)
        self._bad_samples += verdict.bad
        if self._bad_samples:
            self.log("data/bad_samples", float(self._bad_samples))
        self._is_left_out = not verdict.is_sound
        if verdict.is_sound:
            self.nonfinite = 0
            return
        if verdict.losses_are_finite and self._overflow_is_the_scalers():
            return
        optimizer.zero_grad(set_to_none=True)
        self.nonfinite += 1
        self._tell(verdict, done)

    def on_validation_epoch_start(self) -> None:
        """Start the sums over held-out scenes."""
        self._validated = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up losses with noise level and noise fixed for each scene, and no condition dropped."""
        losses = self.losses(batch, [VALIDATION_KEY + p for p in batch.positions.tolist()], drop=False)
        self._validated += torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all scenes of all ranks; Lightning's own would round the number of scenes of a rank."""
        if ranks() > 1:
            torch.distributed.all_reduce(self._validated)
        total, count = self._validated
        self.log("validation/loss", total / count, sync_dist=True)  # the same on all ranks by now

    def losses(self, batch: Batch, keys: list[int], *, drop: bool = True) -> Tensor:
        """Return (B,) losses of the samples whose draws are those of `keys`."""
        return torch.stack(list(self.parts(batch, keys, drop=drop).values())).sum(dim=0)

    def parts(self, batch: Batch, keys: list[int], *, drop: bool = True) -> dict[str, Tensor]:
        """Return the terms of the losses by name: the objective's (B,) first, then those that methods have of their own."""
        latents = self.latents(batch, keys if drop else None).contiguous(memory_format=self.execution.memory_format)
        draws = draw(self.seed, keys, latents.shape[1:], methods=len(self.drops.methods)).to(latents.device)
        given: dict[str, Any] = {}
        scenes, captions = batch.scenes, batch.scenes.captions
        if drop:
            scenes, captions, has_caption = self.drops(scenes, draws.keep)
            given = {"kept": self.drops.zeroed(has_caption), "seen": self.drops.seen(scenes, draws.methods)}
        inputs = self.conditioning(self.backbone, scenes, captions, tuple(latents.shape[-2:]), **given)
        times, noise = self.objective.times(draws), self.objective.noise(draws)
        noised = self.objective.corrupt(latents, noise, times).contiguous(memory_format=self.execution.memory_format)
        prediction = self.backbone.denoise(noised, times, inputs)
        return {
            "objective": self.objective.losses(prediction, latents, noise, times),
            **self.conditioning.losses(inputs),
        }

    def latents(self, batch: Batch, keys: Sequence[int] | None = None) -> Tensor:
        """Return (B, C, h, w) latents: those that the batch brings, or those of its pictures.

        Args:
            batch: B samples.
            keys: of each sample, which with the seed decides what is drawn; None takes the mean of each distribution.

        Returns:
            At a position the draw is that of stored moments there, so that training on either is the same.
        """
        if batch.latents is not None:
            self.backbone.check_latents(tuple(batch.latents.shape[1:]))
            return batch.latents
        assert batch.images is not None
        if keys is None or self.posterior == "mode" or self.backbone.autoencoder is None:
            return self.backbone.encode_images(batch.images)
        mean, log_variance = self.backbone.encode_moments(batch.images).chunk(2, dim=1)
        noise = [latent_noise(self.seed, key, mean.shape[1:]) for key in keys]
        return mean + torch.from_numpy(np.stack(noise)).to(mean) * (log_variance / 2).exp()

    @property
    def _nonfinite_file(self) -> Path:
        return Path(self.trainer.default_root_dir) / NONFINITE

    def _overflow_is_the_scalers(self) -> bool:
        """Return True while float16's loss scale is still being found: it then falls, and the step is not taken anyway."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler is not None and scaler.get_scale() > 1

    def _tell(self, verdict: Verdict, done: Sequence[MicroBatch]) -> None:
        """Write the samples of a step that is left out to a file, from whichever rank had them.

        Args:
            verdict: a loss or a gradient is not finite; of a gradient all samples of the step are told.
            done: this rank's share of the step.

        Raises:
            FloatingPointError: more steps in a row than the settings allow; on every rank alike.
        """
        own = [
            {"step": self.global_step, "rank": self.global_rank, **line} for line in told(done, verdict, self._levels)
        ]
        lines = gathered(own)
        if self.trainer.is_global_zero:
            self._nonfinite_file.parent.mkdir(parents=True, exist_ok=True)
            with self._nonfinite_file.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)
        names = ", ".join(line["scene"] for line in lines[:NAMED]) + (", …" if len(lines) > NAMED else "")
        what = lines[0]["not_finite"]
        message = f"the {what} at step {self.global_step} is not finite for the scenes {names} ({self._nonfinite_file})"
        allowed = self.optimization.max_nonfinite
        if self.nonfinite > allowed:
            raise FloatingPointError(
                f"{message}: {self.nonfinite} steps in a row, trainer.max_nonfinite={allowed}; look at these scenes, lower "
                "optimizer.learning_rate, or raise trainer.max_nonfinite to leave such steps out"
            )
        rank_zero_warn(f"{message}; the step is left out, number {self.nonfinite} of {allowed} in a row")

    def _levels(self, positions: Sequence[int]) -> Tensor:
        """Return (B,) noise levels of the samples at B positions."""
        return self.objective.times(draw(self.seed, positions, (1, 1, 1)))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer over what trains, and its learning-rate schedule."""
        return self.optimization.build(self.trained, steps=self.trainer.max_steps)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then take the new weights into the average, unless the step was left out."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None and not self._is_left_out:
            self.average.update(self.trained)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the adapters their averaged weights, and set everything to evaluation mode, within the block."""
        training = self.training
        self.eval()
        try:
            with self.average.swapped_into(self.trained) if self.average is not None else nullcontext():
                yield
        finally:
            self.train(training)

    def sample(self, scenes: SceneBatch, *, seed: int, **given: Any) -> Tensor:
        """Draw pictures (B, 3, H, W) in [-1, 1] of B scenes from the present weights; `given` as `Sampler.__call__` has it."""
        return self.sampler(self.backbone, self.conditioning, scenes, seed=seed, **given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out and note what the adapters belong to."""
        kept = self._saved_keys()
        checkpoint["state_dict"] = {key: checkpoint["state_dict"][key] for key in kept}
        checkpoint["belongs_to"] = self._identity()
        checkpoint["nonfinite"] = self.nonfinite

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Verify that what is missing from the checkpoint is exactly the frozen part.

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
        self.nonfinite = checkpoint.get("nonfinite", 0)

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
