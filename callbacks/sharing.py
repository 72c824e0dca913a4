"""Work on held-out scenes that the ranks share: none waits for another that draws alone, or that has failed.

Scenes are cut into parts that do not depend on the number of ranks, because in the last digit an image depends on those that
it is drawn with. So what comes out is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch.distributed

from callbacks.observer import RankFailed, described


def shared(
    trainer: pl.Trainer, module: Any, work: Callable[[Any], list[Any]], *, scenes: int, at_once: int
) -> list[Any]:
    """Return what `work` makes of the first held-out scenes, with the averaged weights and no gradients; every rank calls this.

    Args:
        trainer: its data module has `held_out` and `validation_set`.
        module: batches come on its device.
        work: a batch -> something for each of its samples, which other processes can be given.
        scenes: how many scenes, or all that there are.
        at_once: scenes of a batch.

    Returns:
        The same on every rank, in the order of the scenes.

    Raises:
        RankFailed: a rank of several could not do its part; on all of them.
    """
    data, rank, ranks = trainer.datamodule, trainer.global_rank, trainer.world_size  # type: ignore[attr-defined]
    scenes = min(scenes, len(data.validation_set))
    firsts = range(0, scenes, at_once)

    def part(first: int) -> list[Any]:
        return work(data.held_out(min(at_once, scenes - first), first=first).to(module.device))

    if ranks == 1:
        with module.averaged(), torch.no_grad():
            return [item for first in firsts for item in part(first)]
    made: dict[int, list[Any]] = {}
    fault = None
    try:
        with module.averaged(), torch.no_grad():
            for turn in range(0, len(firsts), ranks):
                # A rank with nothing left does the last part too, and one that has failed its next: where weights are
                # sharded, all have to go through the model.
                first = firsts[min(turn + rank, len(firsts) - 1)]
                try:
                    done = part(first)
                except Exception as error:
                    fault = fault or described(error)
                    continue
                if turn + rank < len(firsts):
                    made[first] = done
    except Exception as error:
        fault = fault or described(error)
    if (failed := first_fault(trainer, fault)) is not None:
        raise RankFailed(failed)
    parts: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(parts, made)
    everything = {first: done for made in parts for first, done in made.items()}
    return [item for first in firsts for item in everything[first]]


def first_fault(trainer: pl.Trainer, fault: str | None) -> str | None:
    """Return the failure of the first rank that has one, the same on all of them; every rank calls this.

    Args:
        trainer: knows the ranks.
        fault: what went wrong on this one.

    Returns:
        The fault, with the rank where there are several; None where all went well.
    """
    if trainer.world_size == 1:
        return fault
    faults: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(faults, fault)
    return next((f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault is not None), None)
