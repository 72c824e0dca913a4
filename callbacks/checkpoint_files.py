"""Lightning's plugin that writes the state of a run: a complete file or none, and when `Checkpoint` says so.

What is in a checkpoint, and when one is due, is not decided here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from files.atomic import replacing

LATER = {"write": "later"}
"""`storage_options` of `Trainer.save_checkpoint`: only take the state now, and write it with `CheckpointFiles.write`."""


class CheckpointFiles(TorchCheckpointIO):
    """Write checkpoints to a temporary file, wait for the disk, and rename; Lightning calls this on rank 0 alone.

    Where Lightning's own writes at once, this can wait. The state after the last step has to be taken before its figures are
    logged, and written after. And an error in writing is then not raised within `Trainer.save_checkpoint`, where the other ranks
    would wait for rank 0.
    """

    def __init__(self) -> None:
        self._taken: tuple[dict[str, Any], Path] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Take a checkpoint, and write it unless it is for `LATER`."""
        self._taken = checkpoint, Path(path)
        if storage_options is not LATER:
            self.write()

    def write(self) -> None:
        """Write what was taken last.

        Raises:
            OSError: the disk is full, or the file cannot be written; nothing is left of it, and what was taken is forgotten.
        """
        assert self._taken is not None
        (checkpoint, path), self._taken = self._taken, None
        with replacing(path, temporary=f"{path.stem}.partial") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, in place of what the file said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
