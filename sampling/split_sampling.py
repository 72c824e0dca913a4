"""What `sample.py split=...` does: a picture for each scene of a split, over any number of ranks, exactly once.

Each rank takes its share of the scenes, and no rank waits for another: the manifest says what is made, whoever made it, so
that a killed run goes on with the same command, on another number of ranks too. The last rank to end folds the journals.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from datamodules.shards import ShardSet
from datamodules.transforms import SceneTransform
from runtime.build import build_refiner
from runtime.launch.device import device_of, place_rank, placed
from runtime.launch.ranks import Ranks, ranks_of
from runtime.restoring import load_module, picture_settings, weights_hash
from sampling.generation import NOT_REFINED, generate, refine
from sampling.manifest import Manifest
from sampling.pairs import Pairs
from sampling.scene_split import square_transform
from scenes import Scene
from scenes.forms import read_scenes

if TYPE_CHECKING:
    from lightning_modules.scene_diffusion import SceneDiffusion
    from models.refining import Refiner


def draw_split(cfg: DictConfig, run_cfg: DictConfig, *, environment: Mapping[str, str] = os.environ) -> str:
    """Draws what is still missing of this rank's share.

    Args:
        cfg: what `sample.py` was asked for: `split`, shards or a file of scenes; `out`, the folder of `<scene id>.jpg`; `limit`,
            `seeds` (one), `batch_size`, `picture_format`, and `npz`, true for real and generated pictures in `npz_files_<rank>`.
        run_cfg: the run's own configuration, and scenes become square as its data did; or that of a file of weights.
        environment: tells this process's rank.

    Returns:
        What was made, in a line.

    Raises:
        ValueError: the split cannot be read or has no true pictures for `npz`, or `out` holds other pictures.
    """
    ranks = ranks_of(environment)
    place_rank(run_cfg, ranks)
    device_of(run_cfg.trainer)  # refuses before the weights are read
    split = Path(cfg.split)
    shards = ShardSet(split) if split.is_dir() else None
    if cfg.npz and (shards is None or shards.latents is not None):
        raise ValueError(f"npz=true: {split} has no pictures to set beside; give shards with pictures, or npz=false")
    stored = read_scenes(split) if shards is None else [shards.scene(number) for number in range(len(shards))]
    stored = stored[: cfg.limit]
    refiner = build_refiner(cfg)
    module, _ = load_module(run_cfg, cfg.checkpoint)
    transform = square_transform(run_cfg.data, module.backbone.resolution)
    assert transform is not None
    scenes = [transform.scene(scene) for scene in stored]
    settings = picture_settings(cfg, run_cfg, weights=weights_hash(module), seed=_seed(cfg), arm="with_scene")
    manifest = Manifest(
        cfg.out,
        {**settings, "picture_format": cfg.picture_format},
        writer=str(ranks.rank),
        picture_format=cfg.picture_format,
        subfolder="",
    )
    ids = [scene.id for scene in scenes]
    manifest.check_ids(ids)
    pairs = Pairs(cfg.out, rank=ranks.rank, ranks=ranks.count, scenes=len(scenes)) if cfg.npz else None
    made = _draw(cfg, run_cfg, module, refiner, ranks.share(scenes), manifest, ranks)
    if pairs is not None and shards is not None:
        _write_pairs(pairs, ranks.share(range(len(scenes))), shards, transform, manifest)
    missing = len(manifest.missing(ids))
    if not missing:
        manifest.finish()
    rest = f"{missing} are still to come from other ranks" if missing else "all are there"
    return f"{cfg.out}: rank {ranks.rank} of {ranks.count} made {made} pictures; of {len(ids)} {rest}"


def _seed(cfg: DictConfig) -> int:
    return 0 if cfg.seeds is None else cfg.seeds[0]


def _draw(
    cfg: DictConfig,
    run_cfg: DictConfig,
    module: SceneDiffusion,
    refiner: Refiner | None,
    scenes: Sequence[Scene],
    manifest: Manifest,
    ranks: Ranks,
) -> int:
    """Draws what is missing of some scenes, and tells how many pictures that were."""
    todo = len(manifest.missing([scene.id for scene in scenes]))
    with (
        placed(module, run_cfg.trainer),
        tqdm(total=len(scenes), initial=len(scenes) - todo, unit="picture", disable=ranks.rank > 0) as bar,
    ):
        generate(
            module,
            scenes,
            manifest,
            seed=_seed(cfg),
            batch_size=cfg.batch_size,
            suffix="" if refiner is None else NOT_REFINED,
            progress=lambda done, _total: bar.update(len(scenes) - todo + done - bar.n),
        )
    if refiner is not None:
        refine(refiner.to(device_of(run_cfg.trainer)), scenes, manifest, seed=_seed(cfg))
    return todo


def _write_pairs(
    pairs: Pairs, numbers: Sequence[int], shards: ShardSet, transform: SceneTransform, manifest: Manifest
) -> None:
    """Sets the true pictures of some samples, made square as the run's data was, beside the generated ones."""
    for place, number in enumerate(numbers):
        if pairs.path(place).is_file():
            continue
        record = shards[number]
        assert record.image is not None
        real, _, _ = transform.square(record.image, record.scene)
        pairs.write(place, real, np.asarray(manifest.read(record.scene.id)))
