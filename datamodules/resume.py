"""Lightning's count of micro-batches, brought to the last whole optimizer step when a checkpoint is loaded.

Lightning goes on counting micro-batches where a checkpoint was taken. That is wrong when it was taken within
an accumulated step, whose gradients are lost, when the run goes on with another number of ranks and so of accumulation
steps, and when it was taken after a validation while that is due at other steps now. The data start at `global_step` anyway;
here the count is made to agree.
"""

from typing import Any

import pytorch_lightning as pl


def align_to_step(checkpoint: dict[str, Any], *, accumulate: int, max_steps: int) -> None:
    """Change the loops of a checkpoint to what they are right after its last whole optimizer step.

    Args:
        checkpoint: A checkpoint of Lightning, changed in place.
        accumulate: Micro-batches of a step in the run that goes on.
        max_steps: Steps of that run.
    """
    loops = checkpoint.get("loops")
    if not loops:
        return
    step = checkpoint["global_step"]
    if step == 0:
        # Nothing has been learnt: the loops of a new run, because Lightning's resume of nothing counts a step
        # too many.
        del checkpoint["loops"]
        return
    fit = loops["fit_loop"]
    progress = fit["epoch_loop.batch_progress"]
    total = progress["total"]
    whole = step * accumulate
    if step < max_steps:
        progress["is_last_batch"] = False
    if total["ready"] == total["processed"] == whole == total["completed"] + 1:
        return
    # As in a checkpoint from `on_train_batch_end` of the step's last micro-batch: that one is processed, not
    # completed, and Lightning adds the step to its count for loggers itself.
    for counts in (total, progress["current"]):
        counts.update(ready=whole, started=whole, processed=whole, completed=whole - 1)
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


class ResumeWholeSteps(pl.Callback):
    """Makes a run go on from the last whole optimizer step, wherever in it the checkpoint was taken."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Align the loops before Lightning restores them."""
        align_to_step(checkpoint, accumulate=trainer.accumulate_grad_batches, max_steps=trainer.max_steps)
