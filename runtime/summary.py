"""What a run says when it has ended: where its figures stand, where to look, and what to do next, in commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from loggers.metrics_csv import read_metrics

SMOOTHED = 20  # entries of the log that a loss is the mean of
SHOWN = ("layout/layout_iou", "layout/ap50", "validation/loss")


def ended(cfg: DictConfig, step: int) -> str:
    """The last lines of a run.

    Args:
        cfg: its configuration.
        step: the optimizer step it ended at.

    Returns:
        A line that it is finished, its figures where `metrics.csv` has some, where to look, and commands.
    """
    run = Path(cfg.run)
    rows = _figures(read_metrics(run / "metrics.csv"))
    if looked := _places(run):
        rows.append(("look at", "  ".join(looked)))
    rows += [("next", command) for command in _next(cfg, run, step)]
    return "\n".join([f"{run}: finished at step {step}", *(f"{name:<11}{said}" for name, said in rows)])


def _figures(metrics: Sequence[tuple[int, str, float]]) -> list[tuple[str, str]]:
    """Loss, layout score and speed, as far as they were logged."""
    of: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in metrics:
        of.setdefault(name, []).append((step, value))
    found = []
    if losses := [value for _, value in of.get("train/loss", [])[-SMOOTHED:]]:
        found.append(("loss", f"{sum(losses) / len(losses):.4f}, mean of the last {len(losses)} entries"))
    for name in SHOWN:
        if name in of:
            step, value = of[name][-1]
            found.append((name.rpartition("/")[0], f"{value:.3f} ({name.rpartition('/')[2]}, step {step})"))
    if speeds := sorted(value for _, value in of.get("speed/samples_per_second", [])):
        waited = sorted(value for _, value in of.get("speed/data_wait", [(0, 0.0)]))
        wait = f"{waited[len(waited) // 2]:.0%} of the time waiting for data"
        found.append(("speed", f"{speeds[len(speeds) // 2]:.1f} samples/s, {wait} (medians)"))
    return found


def _places(run: Path) -> list[str]:
    """Files that a person looks at, the newest picture first."""
    pictures = sorted((run / "pictures").glob("step=*.png"))
    places = [str(pictures[-1])] if pictures else []
    if (run / "metrics.csv").is_file():
        places.append(str(run / "metrics.csv"))
    if (run / "tensorboard").is_dir():
        places.append(f"tensorboard --logdir {run}")
    return places


def _next(cfg: DictConfig, run: Path, step: int) -> list[str]:
    """Commands that make sense now."""
    more = 2 * step
    commands = [
        f"python evaluate.py run={run}",
        f"python sample.py run={run} scene=examples/four_shapes.json",
        f"python app.py run={run}",
    ]
    if cfg.conditioning:
        commands.append(f"python convert.py run={run} out={run.name}.safetensors")
    return [*commands, f"the same command with trainer.max_steps={more} trains on"]
