"""The losses of 20 training steps of `shapes_regions`, on CPU in fp32: what a change that should alter no number must keep.

    python -m scripts.golden_losses

writes `tests/golden/shapes_regions_losses.json`; do so only in a change that is meant to alter them, and say why there.
"""

import json
import tempfile
import warnings
from pathlib import Path

from loggers.metrics_csv import read_metrics
from runtime.composition import compose
from runtime.run_directory import RunDirectory
from runtime.training import train

FILE = Path("tests/golden/shapes_regions_losses.json")
SETTINGS = (
    "batch_size=8",
    "trainer.max_steps=20",
    "trainer.log_every=1",
    "trainer.save_every=1000",
    "trainer.validate_every=1000",
    "optimizer.warmup_steps=2",
    "data.make.source.count=200",
    "data.make_validation.source.count=8",
    "logger=[csv]",
    "callback=[]",
)


def losses(folder: str | Path) -> list[float]:
    """Trains in a folder and reads the loss of each step."""
    run = Path(folder) / "run"
    cfg = compose("train", [f"run={run}", f"paths.data={Path(folder) / 'data'}", *SETTINGS])
    directory = RunDirectory(run)
    train(cfg, directory, directory.inspect(cfg))
    return [value for _, name, value in read_metrics(run / "metrics.csv") if name == "train/loss"]


def main() -> None:
    """Writes the file."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        values = losses(folder)
    FILE.write_text(json.dumps(values, indent=1) + "\n")
    print(f"{FILE}: {len(values)} losses, {values[0]:.5f} to {values[-1]:.5f}")


if __name__ == "__main__":
    main()
