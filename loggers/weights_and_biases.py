"""Weights & Biases, with one identity for a run directory: a resumed attempt goes on in the same W&B run.

W&B's own rewinding is not used: what came after the last checkpoint before a kill is there twice, with the same values.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only


@dataclass(frozen=True, kw_only=True)
class BoxedPicture:
    """A picture with boxes to lay over it.

    Attributes:
        picture: RGB.
        boxes: phrase and xyxy in [0, 1] of each.
    """

    picture: Image.Image
    boxes: Sequence[tuple[str, Sequence[float]]]

    def as_image(self) -> Any:
        """Return W&B's image, in which the boxes can be switched on and off."""
        import wandb

        boxes = [
            {
                "position": dict(zip(("minX", "minY", "maxX", "maxY"), map(float, box), strict=True)),
                "class_id": place,
                "box_caption": phrase,
            }
            for place, (phrase, box) in enumerate(self.boxes)
        ]
        labels = {place: phrase for place, (phrase, _) in enumerate(self.boxes)}
        return wandb.Image(
            self.picture, boxes={"scene": {"box_data": boxes, "class_labels": labels}} if boxes else None
        )


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
    def log_evaluation(
        self,
        protocol: str,
        *,
        values: Mapping[str, Mapping[str, Any]],
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
    ) -> None:
        """Log an evaluation: its values in the summary and as a table, its scenes with their pictures as another.

        Args:
            protocol: its name; keys begin with it.
            values: by arm and name: "mean", "low", "high", "count", "failed".
            columns: of the table of scenes.
            rows: one a scene; a cell may be a `BoxedPicture`.
        """
        import wandb

        run = self.experiment
        keys = ("mean", "low", "high", "count", "failed")
        listed = [
            [arm, name, *(value[key] for key in keys)]
            for arm, of_arm in values.items()
            for name, value in of_arm.items()
        ]
        for arm, name, mean, *_ in listed:
            run.summary[f"{protocol}/{arm}/{name}"] = mean
        pictures = [[cell.as_image() if isinstance(cell, BoxedPicture) else cell for cell in row] for row in rows]
        tables = {
            "values": wandb.Table(columns=["arm", "metric", *keys], data=listed),
            "scenes": wandb.Table(columns=list(columns), data=pictures),
        }
        run.log({f"{protocol}/{name}": table for name, table in tables.items()})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the W&B run, so that the next job of a sweep, which has the same process, gets one of its own."""
        super().finalize(status)
        run, self._experiment = self._experiment, None
        if run is not None:
            run.finish(exit_code=0 if status == "success" else 1)


@rank_zero_only
def _keep(file: Path, run_id: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run_id + "\n", encoding="utf-8")
