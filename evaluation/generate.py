"""The second stage of an evaluation: the pictures of each arm, drawn as far as they are this process's share.

Each arm is a set of pictures for the same scenes: drawn with the scene, drawn without it, the true pictures (ceiling) and
true pictures of other scenes (floor), or pictures that something else made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from evaluation.conditions import Arm
from evaluation.image_sets import Folder, Generated, Turned
from evaluation.plan import Evaluation
from runtime.build import build_refiner
from runtime.launch.device import placed
from runtime.restoring import load_module, picture_settings, weights_hash
from sampling.generation import NOT_REFINED, generate, refine
from sampling.manifest import Manifest

if TYPE_CHECKING:
    from scenes import Scene


@dataclass(frozen=True, kw_only=True)
class About:
    """What drew the pictures.

    Attributes:
        checkpoint: Name of the file with the weights, or where the pictures are from.
        step: Optimizer steps of the training; None where it is not known.
        samples_seen: Samples of the training.
        weights_sha256: Hash over all weights.
        device: What drew.
    """

    checkpoint: str
    step: int | None = None
    samples_seen: int | None = None
    weights_sha256: str | None = None
    device: str | None = None


def generate_arms(cfg: DictConfig, run_cfg: DictConfig | None, evaluation: Evaluation) -> tuple[dict[str, Arm], About]:
    """The arms of an evaluation, their pictures drawn as far as they are this process's share, and what drew them."""
    wanted, true, scenes = evaluation.protocol["arms"], evaluation.split.true, evaluation.split.scenes
    rows = evaluation.places.out / "rows"
    ids = [scene.id for scene in scenes]
    about = About(checkpoint=f"images={cfg.images}")
    arms: dict[str, Arm] = {}
    if cfg.images == "real":
        assert true is not None
        arms["real"] = Arm(name="real", sets=(true,), rows=evaluation.places.true_rows / "ceiling")
    elif cfg.images is not None:
        seeds = [Path(cfg.images) / str(seed) for seed in evaluation.protocol["seeds"]]
        folders = seeds if seeds[0].is_dir() else [Path(cfg.images)]
        fit = evaluation.split.framing.fitting(cfg.images_are)
        sets = tuple(Folder(folder, ids, fit=fit, how=f":{cfg.images_are}") for folder in folders)
        arms["pictures"] = Arm(name="pictures", sets=sets, rows=rows / "pictures")
    else:
        assert run_cfg is not None
        with evaluation.timed("drawing"):
            drawn, about = _drawn(cfg, run_cfg, evaluation)
        arms |= {name: Arm(name=name, sets=sets, rows=rows / name) for name, sets in drawn.items()}
    compares = any(evaluation.metric(name).compares for name in evaluation.nodes if name not in evaluation.not_measured)
    if true is not None and ("ceiling" in wanted or compares):
        arms["ceiling"] = Arm(name="ceiling", sets=(true,), rows=evaluation.places.true_rows / "ceiling")
    if true is not None and "floor" in wanted and len(scenes) > 1:
        arms["floor"] = Arm(name="floor", sets=(Turned(true, len(scenes)),), rows=evaluation.places.true_rows / "floor")
    return arms, about


def _drawn(
    cfg: DictConfig, run_cfg: DictConfig, evaluation: Evaluation
) -> tuple[dict[str, tuple[Generated, ...]], About]:
    """Pictures with the scene and without it, a set a seed; of those that are this process's share none is missing."""
    module, checkpoint = load_module(run_cfg, cfg.checkpoint)
    step = module.loaded_step
    about = About(
        step=step,
        samples_seen=None if step is None else step * run_cfg.batch_size,
        weights_sha256=weights_hash(module),
        checkpoint=checkpoint.name,
        device=torch.cuda.get_device_name(evaluation.device)
        if evaluation.device.type == "cuda"
        else evaluation.device.type,
    )
    refiner = build_refiner(cfg)
    scenes = evaluation.split.drawn
    asked = {"with_scene": scenes}
    if module.conditioning.adapters and "without_scene" in evaluation.protocol["arms"]:
        asked["without_scene"] = [scene.without_layout() for scene in scenes]
    picture_format, seeds = evaluation.protocol["picture_format"], evaluation.protocol["seeds"]
    drawn: dict[str, tuple[Generated, ...]] = {}
    for arm, of_arm in asked.items():
        sets = []
        for seed in seeds:
            settings = picture_settings(cfg, run_cfg, weights=str(about.weights_sha256), seed=seed, arm=arm)
            if picture_format != "png":
                settings["picture_format"] = picture_format
            folder = evaluation.places.out / (arm if seed == seeds[0] else f"{arm}.seed={seed}")
            manifest = Manifest(folder, settings, writer=str(evaluation.ranks.rank), picture_format=picture_format)
            manifest.check_ids([scene.id for scene in scenes])
            _draw(
                evaluation, module, refiner, run_cfg, _share(evaluation, of_arm), manifest, seed=seed, what=folder.name
            )
            sets.append(Generated(manifest, [scene.id for scene in scenes], evaluation.split.framing.cut))
        drawn[arm] = tuple(sets)
    return drawn, about


def _share(evaluation: Evaluation, scenes: Sequence[Scene]) -> list[Scene]:
    """This process's scenes: whole batches, so that a scene is drawn in the same batch by whichever process."""
    return [scenes[place] for batch in evaluation.batches for place in batch]


def _draw(
    evaluation: Evaluation,
    module: Any,
    refiner: Any,
    run_cfg: DictConfig,
    scenes: list[Scene],
    manifest: Manifest,
    *,
    seed: int,
    what: str,
) -> None:
    """Draws, and refines where asked, what is missing of some scenes."""
    suffix = "" if refiner is None else NOT_REFINED
    with placed(module, run_cfg.trainer), evaluation.bar(len(scenes), f"generating {what}", "picture") as bar:
        done = len(scenes) - len(manifest.missing([scene.id + suffix for scene in scenes]))
        bar.update(done)
        generate(
            module,
            scenes,
            manifest,
            seed=seed,
            batch_size=evaluation.protocol["batch_size"],
            suffix=suffix,
            progress=lambda count, _total: bar.update(done + count - bar.n),
        )
    if refiner is not None:
        with evaluation.bar(len(scenes), f"refining {what}", "picture") as bar:
            bar.update(len(scenes) - len(manifest.missing([scene.id for scene in scenes])))
            refine(refiner.to(evaluation.device), scenes, manifest, seed=seed, progress=lambda *_: bar.update())
