"""Lightning's count of micro-batches, brought to the last whole optimizer step when a checkpoint is loaded.

Lightning goes on counting micro-batches where a checkpoint was taken. That is wrong when it was taken within
an accumulated step, whose gradients are lost, when the run goes on with another number of ranks and so of accumulation
steps, and when it was taken after a validation while that is due at other steps now. The data start at `global_step` anyway;
here the count is made to agree. A validation that is due at the step, and had not come to its end when the checkpoint was
taken, comes again.
"""

from typing import Any

import pytorch_lightning as pl


def align_to_step(
    checkpoint: dict[str, Any], *, accumulate: int, max_steps: int, validate_every: int | None = None
) -> None:
    """Change the loops of a checkpoint to what they are right after its last whole optimizer step, before its validation.

    Args:
        checkpoint: A checkpoint of Lightning, changed in place.
        accumulate: Micro-batches of a step in the run that goes on.
        max_steps: Steps of that run.
        validate_every: Micro-batches between validations of that run; None where none is to come again.
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
    # As in a checkpoint from `on_train_batch_end` of the step's last micro-batch: that one is processed, not
    # completed, and Lightning adds the step to its count for loggers itself.
    for counts in (total, progress["current"]):
        counts.update(ready=whole, started=whole, processed=whole, completed=whole - 1)
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    if validate_every is not None and whole % validate_every == 0 and step < max_steps:
        # As in one from the midst of a validation, which Lightning takes up, and counts the step after it once more; no batch of
        # it is done.
        validation = fit["epoch_loop.val_loop.batch_progress"]
        validation["total"].update(ready=1, started=1, processed=0, completed=0)
        validation["current"].update(ready=0, started=0, processed=0, completed=0)
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 2


class ResumeWholeSteps(pl.Callback):
    """Makes a run go on from the last whole optimizer step, wherever in it the checkpoint was taken, with its validation."""

    def __init__(self) -> None:
        self._validated = 0  # the last step whose validation has come to its end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the step."""
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes the step."""
        checkpoint["validated"] = self._validated

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Align the loops before Lightning restores them."""
        is_validated = checkpoint.get("validated", checkpoint["global_step"]) == checkpoint["global_step"]
        validates = trainer.limit_val_batches and trainer.check_val_every_n_epoch is None and not is_validated
        align_to_step(
            checkpoint,
            accumulate=trainer.accumulate_grad_batches,
            max_steps=trainer.max_steps,
            validate_every=int(trainer.val_check_interval) if validates else None,
        )
