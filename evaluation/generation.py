"""Pictures for scenes: generated in batches and kept in a manifest, or read from a folder.

A picture is a function of weights, sampler, seed and scene id, so batches only decide how fast they come. Scoring and
reporting live elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from evaluation.manifest import Manifest, picture_name
from models.sampling import to_uint8
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

    Args:
        module: the trained module.
        scenes: what to draw; `Scene.without_layout()` draws the caption alone, from the same start latents.
        manifest: where the pictures go.
        seed: of the start latents.
        batch_size: pictures at a time.
        suffix: of the names by which the manifest has the pictures: the scene's id and this.
        progress: called with (pictures done, pictures to do).
    """
    missing = set(manifest.missing([scene.id + suffix for scene in scenes]))
    todo = [scene for scene in scenes if scene.id + suffix in missing]
    with module.averaged(), torch.no_grad():
        for start in range(0, len(todo), batch_size):
            batch = SceneBatch(todo[start : start + batch_size], device=module.device)
            pictures = to_uint8(module.sample(batch, seed=seed))
            for scene, picture in zip(batch, pictures, strict=True):
                manifest.write(scene.id + suffix, picture)
            if progress is not None:
                progress(min(start + batch_size, len(todo)), len(todo))


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


def read_folder(folder: str | Path, scenes: Sequence[Scene]) -> Iterator[np.ndarray]:
    """The pictures of scenes as (H, W, 3) uint8, from a folder that something else filled with `<scene id>.png` or .jpg.

    Args:
        folder: where the pictures lie; .png is taken before .jpg and .jpeg.
        scenes: the scenes whose pictures are wanted.

    Yields:
        (H, W, 3) uint8, one picture for each scene, in the order of `scenes`.

    Raises:
        ValueError: a scene has no picture there; scoring only those that exist would change the protocol.
    """
    folder = Path(folder)
    missing = [scene.id for scene in scenes if _picture(folder, scene.id) is None]
    if missing:
        raise ValueError(
            f"images={folder}: {len(missing)} of {len(scenes)} scenes have no picture, first {missing[0]}.png; "
            "give one picture for each scene, named by the scene's id"
        )
    for scene in scenes:
        with Image.open(_picture(folder, scene.id)) as picture:  # type: ignore[arg-type]
            yield np.asarray(picture.convert("RGB"))


def _picture(folder: Path, scene_id: str) -> Path | None:
    names = dict.fromkeys((picture_name(scene_id), scene_id))  # as written here, and as others may have
    found = (folder / f"{name}{suffix}" for name in names for suffix in (".png", ".jpg", ".jpeg"))
    return next((path for path in found if path.is_file()), None)
