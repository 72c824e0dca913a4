"""Learning-rate schedules that end where they say: functions of the optimizer step and the run's own number of steps.

Lightning's `estimated_stepping_batches` is never asked: reading it builds the data loaders too early.
"""

import math
import warnings
from collections.abc import Callable


def learning_rate_factor(
    schedule: str, *, steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> Callable[[int], float]:
    """Return the factor on the learning rate at each optimizer step, for `LambdaLR`.

    Args:
        schedule: "constant", "cosine" or "linear".
        steps: optimizer steps of the run; at the last one the factor is `final_fraction` (not for "constant").
        warmup_steps: steps of a linear rise; the first step already moves.
        final_fraction: where the decay ends.

    Returns:
        A function of the optimizer step, counted from 0, that gives the factor on the base learning rate.

    Raises:
        ValueError: an unknown schedule.

    Warns:
        A decay whose warm-up is no shorter than the run: a trial of a long recipe ends while it warms up.
    """
    if schedule not in ("constant", "cosine", "linear"):
        raise ValueError(f"optimizer.schedule={schedule}: unknown; choose constant, cosine or linear")
    if warmup_steps >= steps and schedule != "constant":
        warnings.warn(
            f"optimizer.warmup_steps={warmup_steps}: not less than trainer.max_steps={steps}, so the run ends while it warms up",
            stacklevel=2,
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        done = min((step - warmup_steps) / max(steps - 1 - warmup_steps, 1), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
        return final_fraction + (1 - final_fraction) * fall

    return factor
