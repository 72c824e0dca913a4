"""What `train.py` does once its configuration is checked: build, compare, plan or fit, and say what to do next.

Separate from the script so that tests and notebooks call it as a function. Building each part lives in `build`.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from callbacks.checkpoint import Stopped
from callbacks.signals import SIGNALS
from callbacks.start import StartFrom
from loggers import MetricsCsv, TensorBoard
from runtime.build import build_data, build_module, build_trainer, check_fit
from runtime.launch.device import accumulation
from runtime.launch.launch import decided, first, join, place, refuse_unseen
from runtime.launch.ranks import Ranks
from runtime.launch.requeue import requeue
from runtime.run_directory import Attempt, RunDirectory, RunError
from runtime.summary import ended

if TYPE_CHECKING:
    from datamodules.scene_datamodule import Part, SceneDataModule
    from lightning_modules.scene_diffusion import SceneDiffusion


STOPPED = 75
"""Exit status of a run that a signal has stopped: not finished, and the same command goes on (sysexits' EX_TEMPFAIL)."""


def run(cfg: DictConfig) -> None:
    """Trains the run that a configuration describes, from where it stands; every rank calls it.

    Args:
        cfg: the composed configuration; rank 0's folder is the run's.
    """
    ranks = Ranks() if cfg.plan else join(cfg.trainer)
    if not cfg.plan:
        place(cfg.trainer.copy(), ranks)  # what contradicts the launcher is refused first
    cfg = cfg.copy()
    cfg.run = decided(lambda: str(cfg.run))  # its path may hold the time of day
    directory = RunDirectory(cfg.run)
    attempt = decided(lambda: directory.inspect(cfg))
    if ranks.rank == 0:
        print(attempt.message)
    if attempt.state != "finished":
        train(cfg, directory, attempt)


def train(cfg: DictConfig, directory: RunDirectory, attempt: Attempt) -> SceneDiffusion | None:
    """Fits the run from its newest checkpoint, or plans it.

    Where a signal stops it before its end, the process ends with status 75.

    Args:
        cfg: the composed configuration.
        directory: the run's folder.
        attempt: where the run stands.

    Returns:
        The module as trained (as built, for a plan); None where `trainer.max_time` has stopped it.
    """
    if cfg.start_from is not None:
        checkpoint_of(cfg.start_from)  # refused before anything is made
    if cfg.plan:
        return plan(cfg)
    saves = any(str(node.get("_target_", "")).endswith(".Checkpoint") for node in cfg.callback.values())
    with SIGNALS.heard() if saves else nullcontext():
        try:
            return _fit(cfg, directory, attempt)
        except Stopped as stopped:
            end(stopped, directory, requeues=cfg.trainer.requeue)
    return None


def _fit(given: DictConfig, directory: RunDirectory, attempt: Attempt) -> SceneDiffusion:
    cfg = given.copy()
    ranks = join(cfg.trainer)
    place(cfg.trainer, ranks)
    cfg.trainer.accumulate = accumulation(cfg.batch_size, cfg.trainer)  # data.accumulate is made of it
    data = build_data(cfg)
    first(data.prepare_data)
    data.setup("fit")
    module = build_module(cfg, restored=attempt.checkpoint is not None)
    check_fit(module.conditioning, data.provides, data=cfg.data.shards)
    if (form := data.training_set.latents) is not None:
        module.backbone.check_latents(form.shape, factor=form.scaling_factor)
    if ranks.rank == 0:
        print(summary(cfg, module, data))
    decided(lambda: directory.open(given))
    refuse_unseen(directory.path)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips and device lists
    trainer = build_trainer(cfg)
    if attempt.checkpoint is None and cfg.start_from is not None:
        trainer.callbacks.insert(0, StartFrom(checkpoint_of(cfg.start_from), optimizer=cfg.start_optimizer))  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCsv | TensorBoard) and ranks.rank == 0:
            logger.rewind(attempt.step)
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        trainer.fit(module, datamodule=data, ckpt_path=attempt.checkpoint, weights_only=True)
    if trainer.global_step >= cfg.trainer.max_steps and ranks.rank == 0:
        directory.finish(trainer.global_step)
        print(ended(cfg, trainer.global_step))
    return module


def end(stopped: Stopped, directory: RunDirectory, *, requeues: bool) -> None:
    """Says that a run has stopped before its end, and has SLURM run it again.

    Args:
        stopped: where and why.
        directory: the run's folder.
        requeues: whether SLURM is asked.
    """
    SIGNALS.pass_over()  # a job that is requeued has its processes ended at once
    why = "trainer.max_time is over" if stopped.signal is None else stopped.signal.name

    def say() -> None:
        again = shlex.join(["python", *sys.argv])
        print(
            f"{directory.path}: stopped at step {stopped.step} ({why}); the same command goes on: {again}", flush=True
        )
        if requeues and stopped.signal is not None:
            print(requeue(os.environ), flush=True)

    decided(say)  # launchers end the others when one has ended: none does before rank 0 has said so
    if stopped.signal is not None:
        sys.exit(STOPPED)


def plan(cfg: DictConfig) -> SceneDiffusion:
    """Says what the run would take, and what its data would give it where that is here; makes nothing.

    Args:
        cfg: the composed configuration.

    Returns:
        The module, on the meta device.
    """
    from runtime.planning import planned, shards_of

    module, lines = planned(cfg)
    print(lines)
    if shards_of(cfg):
        data = build_data(cfg)
        data.setup("fit")
        check_fit(module.conditioning, data.provides, data=cfg.data.shards)
        print(summary(cfg, module, data))
    else:
        print(f"validates  {foreseen(cfg.data)}")
    return module


def checkpoint_of(start: str) -> Path:
    """The checkpoint that `start_from` means.

    Args:
        start: a checkpoint, or a run's folder.

    Returns:
        The file, or the newest whole one of the folder.

    Raises:
        RunError: neither.
    """
    path = Path(start)
    found = path if path.is_file() else RunDirectory(path).newest_checkpoint() if path.is_dir() else None
    if found is None:
        raise RunError(
            f"start_from={start}: no run with a checkpoint, and no checkpoint; give runs/NAME or a .ckpt file"
        )
    return found


EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # on two cores a worker process costs more than it fetches
    ".*GPU available but not used.*",
    ".*in eval mode at the start of training.*",  # frozen parts belong there
    ".*LeafSpec.*",  # Lightning's own use of torch's pytree
)


def summary(cfg: DictConfig, module: SceneDiffusion, data: SceneDataModule) -> str:
    """What will be trained, in a few lines.

    Args:
        cfg: the run's configuration.
        module: as built.
        data: as set up.

    Returns:
        Method, parameters, data, steps and what is validated on.
    """
    parts = data.parts(cfg.trainer.max_steps * cfg.batch_size)
    trained = sum(p.numel() for p in module.trained.parameters())
    everything = sum(p.numel() for p in module.backbone.parameters()) + sum(
        p.numel() for p in module.conditioning.parameters()
    )
    node = cfg.trainer
    seen = node.max_steps * cfg.batch_size
    samples = sum(part.samples for part in parts)
    mixed = "".join(
        f"           {part.drawn / seen:.1%} from {part.folder}: {part.drawn} samples of {part.samples} scenes, "
        f"{part.drawn / part.samples:.1f} passes\n"
        for part in parts
        if len(parts) > 1
    )
    names = ", ".join(module.conditioning.adapters) or "no adapter: the backbone itself"
    return (
        f"method     {names}\n"
        f"trains     {trained / 1e6:.2f} M of {everything / 1e6:.2f} M parameters\n"
        f"data       {samples} scenes in {', '.join(str(part.folder) for part in parts)}\n"
        f"{mixed}"
        f"steps      {node.max_steps} of batch {cfg.batch_size} (accumulate {node.accumulate}): "
        f"{seen} samples, {seen / samples:.1f} passes\n"
        f"validates  {validated(data.validation_parts(), held_out=data.validation_shards is None)}"
    )


NOTHING = (
    "on nothing: data.validation_shards=null and data.validation_samples=0, so there are no images and no scores either"
)


def validated(parts: Sequence[Part], *, held_out: bool) -> str:
    """What a run validates on and draws its images of.

    Args:
        parts: what each folder gives.
        held_out: they are folders of training shards.

    Returns:
        How many scenes of which folders.
    """
    if not parts:
        return NOTHING
    if not held_out:
        return f"on {parts[0].drawn} scenes in {parts[0].folder}"
    told = " and ".join(f"{part.drawn} of the {part.samples} in {part.folder}" for part in parts)
    return f"on {sum(part.drawn for part in parts)} scenes held out of training: {told}"


def foreseen(node: DictConfig) -> str:
    """What a run would validate on whose shards are not here.

    Args:
        node: the configuration of its data.

    Returns:
        The folder, or how many scenes would be held out.
    """
    if node.get("validation_shards") is not None:
        return f"on all scenes in {node.validation_shards}"
    if not (count := node.get("validation_samples", 0)):
        return NOTHING
    return f"on {count} scenes held out of training, at most a tenth of all: those whose ids have the lowest hashes"
