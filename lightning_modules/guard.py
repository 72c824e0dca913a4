"""The check of an optimizer step before it is taken: its mean loss over all ranks, and that losses and gradients are finite.

A loss or a gradient that is not finite leaves the step out on every rank together. What the ranks have to know of one another
goes round once for each optimizer step, in a few numbers after the gradients; within a step nothing waits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A rank's part of an optimizer step.

    Attributes:
        ids: of the B scenes.
        positions: of the B samples in the run's order.
        parts: name -> (B,) losses, detached; their sum is what was learnt from.
        bad: samples that could not be read, in whose places others stand.
    """

    ids: Sequence[str]
    positions: Sequence[int]
    parts: Mapping[str, Tensor]
    bad: int = 0

    @property
    def losses(self) -> Tensor:
        """(B,) losses."""
        return torch.stack(list(self.parts.values())).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of all ranks' check of an optimizer step.

    Attributes:
        means: "loss" and each further part of it -> its mean over the samples of all ranks.
        losses_are_finite: on every rank.
        gradients_are_finite: on every rank.
        bad: samples of all ranks that could not be read.
    """

    means: Mapping[str, Tensor]
    losses_are_finite: bool
    gradients_are_finite: bool
    bad: int

    @property
    def is_sound(self) -> bool:
        """True if the step may be taken."""
        return self.losses_are_finite and self.gradients_are_finite


def judge(done: Sequence[MicroBatch], gradients: Iterable[Tensor]) -> Verdict:
    """Check an optimizer step before it is taken; every rank calls this, and all get the same.

    Args:
        done: the rank's micro-batches of the step, as many and of as many samples on every rank.
        gradients: of what trains; of sharded weights the rank's own part is looked at.

    Returns:
        Means over all ranks and what is finite.
    """
    losses = torch.stack([part.losses for part in done])
    further = list(done[0].parts)[1:]
    means = [losses.mean(), *(torch.stack([part.parts[name] for part in done]).mean() for name in further)]
    bad = torch.tensor(sum(part.bad for part in done), device=losses.device)
    wrong = [~losses.isfinite().all(), ~_are_finite(gradients).to(losses.device), bad]
    numbers = torch.stack([number.float() for number in (*wrong, *means)])
    if ranks() > 1:
        torch.distributed.all_reduce(numbers)
    wrong_losses, wrong_gradients, unread = numbers[:3].tolist()
    return Verdict(
        means=dict(zip(("loss", *further), numbers[3:] / ranks(), strict=True)),
        losses_are_finite=wrong_losses == 0,
        gradients_are_finite=wrong_gradients == 0,
        bad=int(unread),
    )


def told(
    done: Sequence[MicroBatch], verdict: Verdict, levels: Callable[[Sequence[int]], Tensor]
) -> list[dict[str, Any]]:
    """Return the lines that are written of a rank's share of a step that is left out, one for each sample.

    Args:
        done: the rank's micro-batches.
        verdict: a loss is not finite, or else a gradient is not, and then any sample may be why.
        levels: (B,) noise levels of the samples at B positions.

    Returns:
        JSON values.
    """
    what = "gradient" if verdict.losses_are_finite else "loss"
    return [
        {"not_finite": what, "scene": scene, "position": position, "noise_level": float(level), "loss": repr(loss)}
        for part in done
        for scene, position, level, loss in zip(
            part.ids, part.positions, levels(part.positions), part.losses.tolist(), strict=True
        )
        if what == "gradient" or not math.isfinite(loss)
    ]


def rewind(file: Path, step: int) -> None:
    """Drop lines of steps from `step` on, which come again, and one that a kill tore."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        file.write_text("".join(kept), encoding="utf-8")


def gathered(own: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks; every rank calls this, and all get the same."""
    if ranks() == 1:
        return own
    lists: list[Any] = [None] * ranks()
    torch.distributed.all_gather_object(lists, own)
    return [item for part in lists for item in part]


def ranks() -> int:
    """Return the number of processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _are_finite(gradients: Iterable[Tensor]) -> Tensor:
    """Return a bool tensor: True if all numbers of some tensors are finite."""
    own = [part.to_local() if hasattr(part, "to_local") else part for part in gradients]
    if not own:
        return torch.tensor(True)
    return torch.nn.utils.get_total_norm(own, norm_type=torch.inf).isfinite()
