"""Pictures for scenes: generated in batches and kept in a manifest.

A picture is a function of weights, sampler, seed and scene id, so batches only decide how fast they come. Scoring and
reporting live elsewhere, reading pictures in `picture_sets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.sampling import to_uint8
from sampling.manifest import Manifest
from scenes import Scene, SceneBatch

if TYPE_CHECKING:
    from lightning_modules.scene_diffusion import SceneDiffusion
    from models.refining import Refiner

NOT_REFINED = "_non_refined"  # behind the name of a picture that was refined, as it was before
Progress = Callable[[int, int], None]


def generate(
    module: SceneDiffusion,
    scenes: Sequence[Scene],
    manifest: Manifest,
    *,
    seed: int,
    batch_size: int,
    suffix: str = "",
    progress: Progress | None = None,
) -> None:
    """Draws every scene that has no whole picture yet, from the averaged weights; `manifest.finish()` is the caller's.

    A batch of which a picture is missing is drawn whole, since a picture's last digits depend on its batch: so that what is made
    after a kill is what an unbroken run makes.

    Args:
        module: the trained module.
        scenes: what to draw; `Scene.without_layout()` draws the caption alone, from the same start latents.
        manifest: where the pictures go.
        seed: of the start latents.
        batch_size: pictures at a time; a batch is consecutive scenes.
        suffix: of the names by which the manifest has the pictures: the scene's id and this.
        progress: called with (pictures done, pictures to do).
    """
    missing = set(manifest.missing([scene.id + suffix for scene in scenes]))
    total, done = len(missing), 0
    with module.averaged(), torch.no_grad():
        for start in range(0, len(scenes), batch_size):
            names = {scene.id + suffix for scene in scenes[start : start + batch_size]} & missing
            if not names:
                continue
            batch = SceneBatch(scenes[start : start + batch_size], device=module.device)
            pictures = to_uint8(module.sample(batch, seed=seed))
            for scene, picture in zip(batch, pictures, strict=True):
                if scene.id + suffix in names:
                    manifest.write(scene.id + suffix, picture)
            done += len(names)
            if progress is not None:
                progress(done, total)


def refine(
    refiner: Refiner,
    scenes: Sequence[Scene],
    manifest: Manifest,
    *,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Refines the pictures that `generate` has made under the suffix `NOT_REFINED`, as far as they have not been.

    `manifest.finish()` is the caller's.

    Args:
        refiner: makes a picture of a picture.
        scenes: what the pictures show.
        manifest: where they are; the refined ones go under the scenes' ids.
        seed: of the refiner's noise.
        progress: called with (pictures done, pictures to do).
    """
    missing = set(manifest.missing([scene.id for scene in scenes]))
    todo = [scene for scene in scenes if scene.id in missing]
    for done, scene in enumerate(todo, start=1):
        picture = np.asarray(manifest.read(scene.id + NOT_REFINED))
        manifest.write(scene.id, refiner(picture, scene, seed=seed))
        if progress is not None:
            progress(done, len(todo))
