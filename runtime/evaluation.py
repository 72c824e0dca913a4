"""What `evaluate.py` does once its configuration is checked: reload the run, generate, score, report.

Each arm is a set of pictures for the same scenes: drawn with the scene, drawn without it, the true pictures (ceiling) and
true pictures of other scenes (floor), or pictures that something else made.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm

from datamodules.shards import ShardSet, has_shards
from evaluation.generation import NOT_REFINED, generate, read_folder, refine
from evaluation.manifest import Manifest
from evaluation.report import PictureRow, choose, write_metrics, write_report
from evaluation.wording import SCORED
from loggers.metrics_csv import read_metrics
from metrics.base import Metric, Row, SceneMetric
from runtime.build import build_module, build_refiner
from runtime.device import MIXED, device_of, placed
from runtime.run_directory import RunDirectory, RunError
from scenes import Scene

if TYPE_CHECKING:
    from lightning_modules.scene_diffusion import SceneDiffusion

LIBRARIES = ("torch", "diffusers", "transformers", "pytorch-lightning", "numpy")
CURVES = ("train/loss", "validation/loss", "layout/")
Arms = dict[str, list[np.ndarray]]


def load_module(run_cfg: DictConfig, checkpoint: str | None) -> tuple[SceneDiffusion, Path]:
    """The module of a run with the weights of a checkpoint, and which checkpoint that is.

    Args:
        run_cfg: the run's own configuration.
        checkpoint: a file; None takes the newest whole one of the run.

    Returns:
        The module in evaluation mode, on the CPU, and the checkpoint's path.

    Raises:
        RunError: the run has no checkpoint.
    """
    path = Path(checkpoint) if checkpoint else RunDirectory(run_cfg.run).newest_checkpoint()
    if path is None or not path.is_file():
        raise RunError(
            f"run={run_cfg.run}: no checkpoint {path or 'yet'}; train it first: python train.py run={run_cfg.run}"
        )
    module = build_module(run_cfg, restored=True)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(stored)
    module.load_state_dict(stored["state_dict"], strict=False)  # on_load_checkpoint has verified the keys
    module.loaded_step = stored["global_step"]
    return module.eval(), path


def held_out(protocol: DictConfig) -> tuple[list[Scene], list[np.ndarray]]:
    """Scenes and true pictures of a protocol's split.

    Args:
        protocol: `shards`, the folder of the split; `scenes`, how many to take from its start, null for all; `make`, where
            given, writes the shards first if there are none.

    Returns:
        The scenes, and their pictures (H, W, 3) uint8 in the same order.

    Raises:
        ValueError: the split has fewer scenes than the protocol asks for.
    """
    node = instantiate(protocol, _convert_="all")
    if node.get("make") is not None and not has_shards(node["shards"]):
        node["make"](out=node["shards"])
    records = ShardSet(node["shards"])
    if records.latents is not None:
        raise ValueError(
            f"protocol.shards: {node['shards']} holds latents, and pictures are scored against pictures; "
            "prepare the same scenes with their pictures"
        )
    count = len(records) if node["scenes"] is None else node["scenes"]
    if len(records) < count:
        raise ValueError(
            f"protocol.scenes: {count} but {node['shards']} holds {len(records)}; lower it or give more shards"
        )
    rows = [records[place] for place in range(count)]
    return [row.scene for row in rows], [row.image for row in rows]


def measure(metrics: Mapping[str, Metric], pictures: Sequence[np.ndarray], scenes: list[Scene]) -> dict[str, list[Row]]:
    """The rows of every metric for one arm, by the metric's name, in the order of the scenes."""
    return {name: metric.measure(pictures, scenes) for name, metric in metrics.items()}


def generated_arms(cfg: DictConfig, run_cfg: DictConfig, scenes: list[Scene], out: Path) -> tuple[Arms, dict[str, Any]]:
    """Pictures with the scene and without it, and what the report says of the weights."""
    device = device_of(run_cfg.trainer)
    module, checkpoint = load_module(run_cfg, cfg.checkpoint)
    about = {
        "step": module.loaded_step,
        "samples_seen": module.loaded_step * run_cfg.batch_size,
        "weights_sha256": weights_hash(module),
        "checkpoint": checkpoint.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    refiner = build_refiner(cfg)
    arms = {"with_scene": scenes}
    if module.conditioning.adapters:
        arms["without_scene"] = [scene.without_layout() for scene in scenes]
    pictures: Arms = {}
    for arm, asked in arms.items():
        settings = picture_settings(cfg, run_cfg, weights=about["weights_sha256"], seed=cfg.protocol.seed, arm=arm)
        manifest = Manifest(out / arm, settings)
        with (
            placed(module, run_cfg.trainer),
            tqdm(total=len(asked), desc=f"generating {arm}", unit="picture", dynamic_ncols=True) as bar,
        ):
            suffix = "" if refiner is None else NOT_REFINED
            done = len(asked) - len(manifest.missing([scene.id + suffix for scene in asked]))
            bar.update(done)
            generate(
                module,
                asked,
                manifest,
                seed=cfg.protocol.seed,
                batch_size=cfg.protocol.batch_size,
                suffix=suffix,
                progress=lambda count, _total, bar=bar, done=done: bar.update(done + count - bar.n),
            )
        if refiner is not None:
            with tqdm(total=len(asked), desc=f"refining {arm}", unit="picture", dynamic_ncols=True) as bar:
                bar.update(len(asked) - len(manifest.missing([scene.id for scene in asked])))
                refine(
                    refiner.to(device),
                    asked,
                    manifest,
                    seed=cfg.protocol.seed,
                    progress=lambda *_, bar=bar: bar.update(),
                )
        manifest.finish()
        pictures[arm] = [np.asarray(manifest.read(scene.id)) for scene in asked]
    return pictures, about


def picture_settings(cfg: DictConfig, run_cfg: DictConfig, *, weights: str, seed: int, arm: str) -> dict[str, Any]:
    """All that decides what a picture of a scene looks like, as its manifest keeps it; the refiner is the command's."""
    settings = {
        "weights": weights,
        "sampler": OmegaConf.to_container(run_cfg.sampler, resolve=True),
        "seed": seed,
        "arm": arm,
    }
    if run_cfg.trainer.precision in MIXED:
        settings["precision"] = run_cfg.trainer.precision
    if cfg.refiner is not None:
        settings["refiner"] = OmegaConf.to_container(cfg.refiner, resolve=True)
    return settings


def evaluate(cfg: DictConfig, run_cfg: DictConfig) -> dict[str, Any]:
    """Generates or reads pictures, scores them beside ceiling and floor, and writes `metrics.json` and `report.html`."""
    out = Path(cfg.out or Path(cfg.run) / "evaluation" / cfg.protocol.name)
    scenes, true = held_out(cfg.protocol)
    metrics = {name: instantiate(node, _convert_="all") for name, node in cfg.metric.items()}
    if cfg.images is not None and cfg.refiner is not None:
        raise ValueError(f"refiner: images={cfg.images} are scored as they are; leave the refiner out")
    if cfg.images is None:
        arms, about = generated_arms(cfg, run_cfg, scenes, out)
    else:
        is_real = cfg.images == "real"
        arms = {"real" if is_real else "pictures": true if is_real else list(read_folder(cfg.images, scenes))}
        about = {"step": None, "samples_seen": None, "weights_sha256": None, "checkpoint": f"images={cfg.images}"}
    arms |= {"ceiling": true, "floor": [*true[1:], true[0]]}
    measured = {arm: measure(metrics, pictures, scenes) for arm, pictures in arms.items()}
    values = {
        arm: {
            key: value
            for name, metric in metrics.items()
            for key, value in metric.compute(rows[name], true=measured["ceiling"][name]).items()
        }
        for arm, rows in measured.items()
    }
    rows = {arm: scene_scores(metrics, of_arm, len(scenes)) for arm, of_arm in measured.items()}
    result = {
        "values": values,
        "protocol": protocol_of(cfg, run_cfg, scenes=len(scenes)),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}},
        "run": str(cfg.run),
        **about,
    }
    write_metrics(out / "metrics.json", result)
    write_report(out / "report.html", result, pictures=picture_rows(scenes, arms, rows), curves=curves(Path(cfg.run)))
    return {**result, "out": out}


def scene_scores(
    metrics: Mapping[str, Metric], rows: Mapping[str, list[Row]], count: int
) -> list[dict[str, float | None]]:
    """What the metrics that score picture by picture said of each scene."""
    scores: list[dict[str, float | None]] = [{} for _ in range(count)]
    for name, metric in metrics.items():
        if isinstance(metric, SceneMetric):
            for score, row in zip(scores, rows[name], strict=True):
                score.update({column: row.get(column) for column in metric.columns})
    return scores


def picture_rows(
    scenes: list[Scene], arms: Arms, scores: Mapping[str, list[dict[str, float | None]]]
) -> list[PictureRow]:
    """The scenes that the report shows: a fixed choice, the best and the worst."""
    scored = next(arm for arm in SCORED if arm in arms)
    chosen = choose({scene.id: scores[scored][place].get("layout_iou") for place, scene in enumerate(scenes)})
    wanted = {*chosen.fixed, *chosen.best, *chosen.worst}
    return [
        PictureRow(
            scene=scene,
            true=Image.fromarray(arms["ceiling"][place]) if scored != "real" else None,
            picture=Image.fromarray(arms[scored][place]),
            without_scene=Image.fromarray(arms["without_scene"][place]) if "without_scene" in arms else None,
            arm=scored,
            scores={arm: scores[arm][place] for arm in arms if arm != "floor"},
        )
        for place, scene in enumerate(scenes)
        if scene.id in wanted
    ]


def protocol_of(cfg: DictConfig, run_cfg: DictConfig, *, scenes: int) -> dict[str, Any]:
    """Everything that a reader needs to make the numbers again."""
    return {
        "name": cfg.protocol.name,
        "split": cfg.protocol.shards,
        "scenes": scenes,
        "sampler": run_cfg.sampler.scheduler["_target_"].split(".")[1] if cfg.images is None else None,
        "steps": run_cfg.sampler.steps if cfg.images is None else None,
        "guidance": run_cfg.sampler.guidance if cfg.images is None else None,
        "grounding_fraction": run_cfg.sampler.grounding_fraction if cfg.images is None else None,
        "precision": run_cfg.trainer.precision if cfg.images is None else None,
        "negative_prompt": run_cfg.sampler.get("negative_prompt") if cfg.images is None else None,
        "guidance_rescale": run_cfg.sampler.get("guidance_rescale", 0.0) if cfg.images is None else None,
        "seeds": [cfg.protocol.seed],
        "filters": list(cfg.protocol.get("filters", ())),
        "images": cfg.images,
        "refiner": None if cfg.refiner is None else OmegaConf.to_container(cfg.refiner, resolve=True),
    }


def weights_hash(module: SceneDiffusion) -> str:
    """SHA-256 over the averaged weights that draw the pictures, frozen ones included."""
    digest = hashlib.sha256()
    with module.averaged():
        for part in (module.backbone, module.conditioning):
            for key, value in sorted(part.state_dict().items()):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Loss and layout scores over steps, from the run's `metrics.csv`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for step, name, value in read_metrics(run / "metrics.csv"):
        if name.startswith(CURVES):
            found.setdefault(name, []).append((step, value))
    return found
