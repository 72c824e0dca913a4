"""The study of methods: each method and each combination, on one backbone, one data set and one budget, three seeds.

    python -m scripts.study [OUT]

Trains and evaluates what is not there yet, one run after the other, and writes `study.json`, `study.svg` and a table. Killed, the
same command goes on: every run is resumed, every evaluation too. What it shows is told in docs/study.md.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluation.report.wording import title

METHODS = ("regions", "boxes", "scene_graph")
ARMS = [arm for number in (1, 2, 3) for arm in itertools.combinations(METHODS, number)]
SEEDS = (0, 1, 2)
SCENES = 64  # of the test split, the same for all runs
VALUES = ("layout_iou", "colour", "shape", "relations")
WIDTH, ROW, LEFT, GAP = 790, 22, 200, 14  # px of the picture


def train_command(arm: Sequence[str], seed: int, run: Path) -> list[str]:
    """What trains a run, or goes on with it."""
    methods = f"conditioning=[{','.join(arm)}]"
    return ["train.py", "experiment=study", methods, f"seed={seed}", f"run={run}"]


def evaluate_command(run: Path) -> list[str]:
    """What measures a run, or goes on with it."""
    return ["evaluate.py", f"run={run}", "protocol=shapes", f"protocol.scenes={SCENES}", "report.pictures=16"]


def run_of(out: Path, arm: Sequence[str], seed: int) -> Path:
    """The folder of a run."""
    return out / "-".join(arm) / f"seed{seed}"


def measured(run: Path) -> dict[str, Any] | None:
    """The values of a run's evaluation; None where it has not ended."""
    file = run / "evaluation" / "shapes" / "metrics.json"
    return json.loads(file.read_text(encoding="utf-8"))["values"] if file.is_file() else None


def cost(arm: Sequence[str]) -> dict[str, float]:
    """What a method takes: parameters that train, and operations of a step, counted on the meta device.

    Args:
        arm: the methods.

    Returns:
        `trained`, in parameters, and `step`, the floating-point operations of a sample, forward and backward.
    """
    from runtime.composition import compose
    from runtime.planning import dry_pass, skeleton

    cfg = compose("train", ["experiment=study", f"conditioning=[{','.join(arm)}]", "run=."])
    module = skeleton(cfg)
    one = dry_pass(module, 8, objects=3, pictures=True, half=False)
    trained = sum(p.numel() for p in module.trained.parameters() if p.requires_grad)
    return {"trained": trained, "step": one.flops / 8}


def summary(out: Path) -> dict[str, Any]:
    """Every arm's values by seed, those without a scene as an arm of its own, and what each costs.

    Args:
        out: the study's folder.

    Returns:
        JSON values; methods without a finished run are not among them.
    """
    arms: dict[str, Any] = {}
    for arm in ARMS:
        runs = {seed: values for seed in SEEDS if (values := measured(run_of(out, arm, seed))) is not None}
        if not runs:
            continue
        arms["+".join(arm)] = {
            "seeds": sorted(runs),
            **{
                key: {name: [runs[seed][key][name]["mean"] for seed in sorted(runs)] for name in VALUES}
                for key in ("with_scene", "without_scene")
            },
            **cost(arm),
        }
    return {"scenes": SCENES, "arms": arms}


def table(found: Mapping[str, Any]) -> str:
    """The study as a table in Markdown: means over seeds, with the least and the most in brackets."""

    def cell(values: Sequence[float]) -> str:
        spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    lines = [
        f"| methods | {' | '.join(VALUES)} | without the scene: layout_iou, relations | parameters | operations | seeds |",
        f"|---|{'---|' * len(VALUES)}---|---|---|---|",
    ]
    least = min((arm["step"] for arm in found["arms"].values()), default=1.0)
    for name, arm in found["arms"].items():
        cells = " | ".join(cell(arm["with_scene"][value]) for value in VALUES)
        bare = ", ".join(f"{statistics.mean(arm['without_scene'][value]):.3f}" for value in ("layout_iou", "relations"))
        took = f"{arm['trained'] / 1e6:.2f} M | {arm['step'] / least:.2f} ×"
        lines.append(f"| {name.replace('+', ' + ')} | {cells} | {bare} | {took} | {len(arm['seeds'])} |")
    return "\n".join(lines) + "\n"


def picture(found: Mapping[str, Any]) -> str:
    """The study as an SVG: a panel for each value, a row for each arm, a dot for each seed, a bar for their mean.

    A stroke marks the mean without the scene: the same weights, given the caption alone.
    """
    rows = list(found["arms"].items())
    panel = (WIDTH - LEFT) / len(VALUES) - GAP
    height = ROW * (len(rows) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for place, value in enumerate(VALUES):
        x0 = LEFT + place * (panel + GAP)
        parts.append(f'<text x="{x0 + panel / 2:.1f}" y="14" text-anchor="middle">{escape(title(value))}</text>')
        for mark in (0, 0.5, 1):
            x = x0 + mark * panel
            parts.append(f'<path d="M{x:.1f} {ROW}V{height - ROW}" stroke="#ddd"/>')
            parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle" fill="#666">{mark:g}</text>')
        for row, (_, arm) in enumerate(rows):
            y = ROW * (row + 1.5)
            values, mean = arm["with_scene"][value], statistics.mean(arm["with_scene"][value])
            bare = x0 + statistics.mean(arm["without_scene"][value]) * panel
            parts.append(f'<rect x="{x0:.1f}" y="{y - 5:.1f}" width="{mean * panel:.1f}" height="10" fill="#93c5fd"/>')
            parts += [f'<circle cx="{x0 + each * panel:.1f}" cy="{y:.1f}" r="2.5" fill="#1e3a8a"/>' for each in values]
            parts.append(f'<path d="M{bare:.1f} {y - 8:.1f}v16" stroke="#b91c1c" stroke-width="2"/>')
    for row, (name, _) in enumerate(rows):
        y, text = ROW * (row + 1.5) + 4, name.replace("+", " + ").replace("_", " ")
        parts.append(f'<text x="{LEFT - 5}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing, and writes what there is.

    Args:
        arguments: the folder of the study.
    """
    out = Path(arguments[0] if arguments else "runs/study")
    missing = [(seed, arm) for seed in SEEDS for arm in ARMS if measured(run_of(out, arm, seed)) is None]
    for number, (seed, arm) in enumerate(missing, start=1):
        run = run_of(out, arm, seed)
        print(f"--- {number} of {len(missing)}: {' + '.join(arm)}, seed {seed}", flush=True)
        for command in (train_command(arm, seed, run), evaluate_command(run)):
            subprocess.run([sys.executable, *command], check=True)
    found = summary(out)
    (out / "study.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "study.svg").write_text(picture(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
