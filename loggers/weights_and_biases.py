"""Weights & Biases, with one identity for a run directory: a resumed attempt goes on in the same W&B run.

W&B's own rewinding is not used: what came after the last checkpoint before a kill is there twice, with the same values.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only


class WeightsAndBiases(WandbLogger):
    """Lightning's logger; the id of the W&B run is kept in the run directory.

    Args:
        save_dir: the run directory; W&B's own files go into `wandb` there.
        id: of the W&B run; None takes that of the attempt before, or a new one.
        **settings: as Lightning takes them, and beyond those `wandb.init`.
    """

    def __init__(self, *, save_dir: str | Path, id: str | None = None, **settings: Any) -> None:
        folder = Path(save_dir)
        file = folder / "wandb" / "run_id"
        id = id or (file.read_text(encoding="utf-8").strip() if file.is_file() else secrets.token_hex(4))
        _keep(file, id)
        super().__init__(save_dir=folder, id=id, **settings)
        self._wandb_init.pop("anonymous")  # W&B has given the setting up, and warns where it is named

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the W&B run, so that the next job of a sweep, which has the same process, gets one of its own."""
        super().finalize(status)
        run, self._experiment = self._experiment, None
        if run is not None:
            run.finish(exit_code=0 if status == "success" else 1)


@rank_zero_only
def _keep(file: Path, run_id: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run_id + "\n", encoding="utf-8")
