"""Training speed through Lightning, with the run's callbacks and loggers, against a bare loop over the same step.

Both sides take the same data, module and optimizer and take turns, so that a busy machine slows both. The goal is a
ratio of at least 0.98.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from datamodules.batch import collate
from datamodules.loaders import PositionDataset
from datamodules.order import GlobalBatches
from runtime.build import build_data, build_module, build_trainer
from runtime.composition import compose


class Clock(pl.Callback):
    """Seconds from the end of the first step to the end of the last."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Notes the time of every step."""
        now = time.perf_counter()
        self.began = getattr(self, "began", now)
        self.seconds = now - self.began


def through_lightning(cfg: Any) -> float:
    """Steps per second of `trainer.fit`."""
    trainer, clock = build_trainer(cfg), Clock()
    trainer.callbacks.append(clock)
    trainer.fit(build_module(cfg), datamodule=build_data(cfg))
    return (cfg.trainer.max_steps - 1) / clock.seconds


def bare_loop(cfg: Any) -> float:
    """Steps per second of the same step in a plain loop."""
    data, module = build_data(cfg), build_module(cfg)
    data.prepare_data()
    dataset = PositionDataset(data.training_set, data._transform, order=data.order)
    batches = GlobalBatches(cfg.batch_size)
    parameters = list(module.trained.parameters())
    optimizer = module.optimization.optimizer(parameters)
    module.train()
    for step in range(cfg.trainer.max_steps):
        batch = collate([dataset[position] for position in batches.positions(step, 0)])
        module.losses(batch, batch.positions.tolist()).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.trainer.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        module.average.update(module.trained)
        if step == 0:
            began = time.perf_counter()
    return (cfg.trainer.max_steps - 1) / (time.perf_counter() - began)


def main() -> None:
    """Measures in turns and prints each pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="overrides of train.py")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            cfg = compose(
                "train",
                [
                    f"run={Path(folder) / str(number)}",
                    f"trainer.max_steps={arguments.steps}",
                    "trainer.save_every=100000",
                    "trainer.validate_every=100000",
                    "optimizer.warmup_steps=1",
                    "callback=[progress,gates]",
                    *arguments.overrides,
                ],
            )
            sides = (bare_loop, through_lightning) if number % 2 else (through_lightning, bare_loop)
            speeds = {side.__name__: side(cfg) for side in sides}
            ratios.append(speeds["through_lightning"] / speeds["bare_loop"])
            print(
                f"round {number}: Lightning {speeds['through_lightning']:.2f} steps/s, bare loop "
                f"{speeds['bare_loop']:.2f} steps/s, ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} rounds of {arguments.steps} steps")


if __name__ == "__main__":
    main()
