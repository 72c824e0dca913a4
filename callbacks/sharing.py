"""Work on held-out scenes that the ranks share: none waits for another that draws alone.

Scenes are cut into parts that do not depend on the number of ranks, because in the last digit a picture depends on those that
it is drawn with. So what comes out is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch.distributed


def shared(
    trainer: pl.Trainer, module: pl.LightningModule, work: Callable[[Any], list[Any]], *, scenes: int, at_once: int
) -> list[Any]:
    """What `work` makes of the first held-out scenes; every rank calls it.

    Args:
        trainer: its data module has `held_out` and `validation_set`.
        module: batches come on its device.
        work: a batch -> something for each of its samples, which other processes can be given.
        scenes: how many scenes, or all that there are.
        at_once: scenes of a batch.

    Returns:
        The same on every rank, in the order of the scenes.
    """
    data, rank, ranks = trainer.datamodule, trainer.global_rank, trainer.world_size  # type: ignore[attr-defined]
    scenes = min(scenes, len(data.validation_set))
    firsts = range(0, scenes, at_once)
    made: dict[int, list[Any]] = {}
    for turn in range(0, len(firsts), ranks):
        # A rank with nothing left does the last part too: where weights are sharded, all have to go through the model.
        first = firsts[min(turn + rank, len(firsts) - 1)]
        done = work(data.held_out(min(at_once, scenes - first), first=first).to(module.device))
        if turn + rank < len(firsts):
            made[first] = done
    parts = [made]
    if ranks > 1:
        parts = [{} for _ in range(ranks)]
        torch.distributed.all_gather_object(parts, made)
    everything = {first: done for part in parts for first, done in part.items()}
    return [item for first in firsts for item in everything[first]]
