"""What is said of an evaluation once everything is measured: `metrics.json`, `scenes.csv` and the page."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from evaluation.aggregate import Scores
from evaluation.generate import About
from evaluation.image_sets import PictureSet
from evaluation.plan import Evaluation
from evaluation.report.page import PictureRow, choose, write_metrics, write_report
from evaluation.report.plots import Plot, Point
from evaluation.report.wording import ARMS, SCORED, lower_is_better, primary_metric, title
from evaluation.scene_scores import SceneScores
from loggers.metrics_csv import read_metrics
from loggers.weights_and_biases import BoxedPicture

if TYPE_CHECKING:
    from scenes import Scene

LIBRARIES = ("torch", "diffusers", "transformers", "pytorch-lightning", "numpy")
CURVES = ("train/loss", "validation/loss", "layout/")
FAILURES = 20  # pictures that could not be scored and are named, of a metric and an arm
PLOTTED = 6  # scores that are drawn over the number of objects
REPOSITORY = Path(__file__).resolve().parents[2]


def write_outcome(
    cfg: DictConfig,
    run_cfg: DictConfig | None,
    evaluation: Evaluation,
    about: About,
    scores: Scores,
    pictures: Mapping[str, PictureSet],
) -> dict[str, Any]:
    """Writes the files of an evaluation.

    Args:
        cfg: What `evaluate.py` was asked for.
        run_cfg: What pictures were drawn with; None where they were given.
        evaluation: What was evaluated.
        about: What drew the pictures.
        scores: What was found.
        pictures: By arm.

    Returns:
        What `metrics.json` has, and "out".
    """
    out = evaluation.places.out
    command = {"command": _command()} if HydraConfig.initialized() else {}
    result = {
        "values": scores.values,
        "protocol": _protocol(cfg, run_cfg, evaluation),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}},
        "run": str(cfg.run or cfg.weights or cfg.images),
        **asdict(about),
        "metrics": {
            name: evaluation.metric(name).settings() for name in evaluation.nodes if name not in evaluation.not_measured
        },
        "not_measured": evaluation.not_measured,
        "failures": {
            arm: {name: {"count": len(lines), "first": list(lines[:FAILURES])} for name, lines in of_arm.items()}
            for arm, of_arm in scores.failures.items()
        },
        "published": evaluation.protocol["published"],
        "implementations": evaluation.protocol["implementations"],
        "git_commit": git_commit(),
        "wall_time_s": {**evaluation.seconds, "processes": evaluation.ranks.count},
        **command,
    }
    write_metrics(out / "metrics.json", result)
    scores.of_scenes.write(out / "scenes.csv")
    scored = next(arm for arm in SCORED if arm in pictures)
    rows = _picture_rows(
        evaluation,
        scores.of_scenes,
        pictures,
        scored,
        primary=primary_metric({k: dict(v) for k, v in scores.values.items()}),
        most=cfg.report.pictures,
    )
    drawn = {} if cfg.run is None or cfg.images is not None else curves(Path(cfg.run))
    write_report(
        out / "report.html",
        result,
        pictures=rows,
        curves=drawn,
        plots=_by_complexity(scores.of_scenes, scored, list(pictures)),
    )
    for node in cfg.logger.values():
        _log(node, out, result, rows)
    return {**result, "out": out}


def _log(node: DictConfig, out: Path, result: Mapping[str, Any], rows: Sequence[PictureRow]) -> None:
    """Sends tables and pictures of an evaluation to Weights & Biases."""
    logger = instantiate({**node, "save_dir": node.save_dir or str(out)}, _convert_="all")
    scored = next(iter(rows)).arm if rows else ""
    names = sorted({name for row in rows for name in row.of_arm(scored)})
    logger.log_evaluation(
        str(result["protocol"]["name"]),
        values={
            arm: {name: asdict(value) for name, value in of_arm.items()} for arm, of_arm in result["values"].items()
        },
        columns=["scene", "caption", "true", ARMS.get(scored, scored), "without the scene", *names],
        rows=[
            [
                row.scene.id,
                row.scene.caption,
                *(_boxed(picture, row.scene) for picture in (row.true, row.picture, row.without_scene)),
                *(row.score(name) for name in names),
            ]
            for row in rows
        ],
    )
    logger.finalize("success")


def _boxed(picture: Image.Image | None, scene: Scene) -> BoxedPicture | None:
    """A picture with the scene's boxes."""
    boxed = [(item.phrase, item.box) for item in scene.objects if item.box is not None]
    return None if picture is None else BoxedPicture(picture=picture, boxes=boxed)


def curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Loss and layout scores over steps, from the run's `metrics.csv`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for step, name, value in read_metrics(run / "metrics.csv"):
        if name.startswith(CURVES):
            found.setdefault(name, []).append((step, value))
    return found


def git_commit() -> str | None:
    """The commit of the code, "-dirty" behind it where files differ; None outside a checkout."""
    try:
        asked = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _command() -> str:
    return shlex.join(["python", "evaluate.py", *HydraConfig.get().overrides.task])


def _protocol(cfg: DictConfig, run_cfg: DictConfig | None, evaluation: Evaluation) -> dict[str, Any]:
    """Everything that a reader needs to make the numbers again."""
    protocol, split = evaluation.protocol, evaluation.split
    made = cfg.images is None and run_cfg is not None
    sampler = run_cfg.sampler if made and run_cfg is not None else None
    return {
        "name": protocol["name"],
        "split": split.name,
        "scenes": len(split.scenes),
        "scenes_of_split": split.whole,
        "scenes_published": protocol["expected"],
        "sampler": None if sampler is None else sampler.scheduler["_target_"].split(".")[1],
        "steps": None if sampler is None else sampler.steps,
        "guidance": None if sampler is None else sampler.guidance,
        "grounding_fraction": None if sampler is None else sampler.grounding_fraction,
        "precision": run_cfg.trainer.precision if made and run_cfg is not None else None,
        "negative_prompt": None if sampler is None else sampler.get("negative_prompt"),
        "guidance_rescale": None if sampler is None else sampler.get("guidance_rescale", 0.0),
        "size": protocol["size"] if run_cfg is None else run_cfg.backbone.get("resolution"),
        "picture_format": protocol["picture_format"] if made else None,
        "seeds": protocol["seeds"],
        "filters": list(protocol["filters"]),
        "transform": protocol["transform"],
        "images": cfg.images,
        "images_are": None if cfg.images in (None, "real") else cfg.images_are,
        "refiner": None if cfg.refiner is None else OmegaConf.to_container(cfg.refiner, resolve=True),
    }


def _picture_rows(
    evaluation: Evaluation,
    scores: SceneScores,
    pictures: Mapping[str, PictureSet],
    scored: str,
    *,
    primary: str | None,
    most: int,
) -> list[PictureRow]:
    """The scenes that the report shows: all, or some by lot, the best and the worst."""
    scenes = evaluation.split.scenes
    columns = scores.columns(scored)
    metric = primary if primary in columns else columns[0] if columns else ""
    shown = {scene.id for scene in scenes}
    if len(scenes) > most:
        sign = -1 if lower_is_better(metric) else 1
        found = [scores.of(scored, place).get(metric) for place in range(len(scenes))]
        known = {scene.id: None if score is None else sign * score for scene, score in zip(scenes, found, strict=True)}
        choice = choose(known, fixed=len(scenes), extremes=most // 4)
        by_lot = dict.fromkeys([*choice.best, *choice.worst, *choice.fixed])
        shown = set(list(by_lot)[:most])

    def picture(arm: str, place: int) -> Image.Image | None:
        return Image.fromarray(pictures[arm].read(place)) if arm in pictures else None

    return [
        PictureRow(
            scene=scene,
            true=picture("ceiling", place) if scored != "real" else None,
            picture=Image.fromarray(pictures[scored].read(place)),
            without_scene=picture("without_scene", place),
            arm=scored,
            scores={arm: scores.of(arm, place) for arm in pictures if arm != "floor"},
            failures=scores.failures(scored, place),
        )
        for place, scene in enumerate(scenes)
        if scene.id in shown
    ]


def _by_complexity(scores: SceneScores, scored: str, arms: Sequence[str]) -> list[Plot]:
    """The first scores over the number of objects, where there are scenes of different numbers."""
    drawn = []
    for column in scores.columns(scored)[:PLOTTED]:
        series = {
            ARMS[arm]: [Point(x=x, y=y, said=f"{x} objects: {y:.3f}, {n} scenes") for x, y, n in found]
            for arm in arms
            if arm != "floor" and len(found := scores.by_objects(arm, column)) > 1
        }
        if series:
            drawn.append(Plot(title=title(column), x="objects in the scene", y=title(column), series=series, unit=True))
    return drawn
