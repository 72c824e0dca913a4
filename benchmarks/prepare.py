"""What preparation costs beside the work itself: conversion of a source and the stage `latents`, against bare loops.

A bare loop reads the same files, decodes the same pictures and runs the same autoencoder, and writes what it has with neither
checks, checksums nor a way to go on after a kill. Both sides take turns in one process, so that a busy machine slows both. The
goal is a ratio of at least 0.9. By default the autoencoder is a tiny one at random weights; on a GPU take `--resolution 512
--device cuda backbone=sdxl`.
"""

import argparse
import io
import json
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from webdataset import TarWriter

from datamodules.sources.folder import Folder
from models.backbones.base import Backbone
from preparation.conversion import convert_source
from preparation.latents import ImageTransform, Latents
from preparation.runner import run_stage
from preparation.stages import open_part
from runtime.composition import compose

SIZE = (480, 640)  # (height, width) px of the pictures, COCO's commonest; with this grain a file has 150 KB, as there
GRAIN = 4
THREADS, BATCH = 4, 8


def make_folder(root: Path, count: int) -> None:
    """Writes pictures and their Scenes as `source=folder` reads them."""
    root.mkdir()
    numbers = np.random.default_rng(0)
    with (root / "scenes.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(count):
            coarse = numbers.integers(0, 256, (SIZE[0] // GRAIN, SIZE[1] // GRAIN, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)
            picture.save(root / f"{number}.jpg", quality=90)
            objects = [{"phrase": f"thing {n}", "box": [0.1 * n, 0.1, 0.1 * n + 0.3, 0.7]} for n in range(7)]
            scene = {"id": str(number), "caption": "things in a row", "objects": objects}
            lines.write(json.dumps(scene) + "\n")


def convert(root: Path, out: Path, shard_size: int) -> None:
    """The source to shards."""
    convert_source(Folder(root=str(root)), out, shard_size=shard_size)


def convert_barely(root: Path, out: Path, shard_size: int) -> None:
    """The same pictures, each decoded once, and lines of JSON in tars."""
    out.mkdir()
    lines = (root / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
    for first in range(0, len(lines), shard_size):
        with TarWriter(str(out / f"{first:06d}.tar"), encoder=False) as tar:
            for line in lines[first : first + shard_size]:
                scene = json.loads(line)
                picture = (root / f"{scene['id']}.jpg").read_bytes()
                Image.open(io.BytesIO(picture)).load()
                tar.write({"__key__": scene["id"], "jpg": picture, "json": json.dumps(scene).encode()})


def encode(backbone: Backbone, resolution: int, device: str) -> Callable[[Path, Path], None]:
    """The stage over shards."""
    squares = ImageTransform(resolution=resolution)
    stage = Latents(lambda: backbone, model={}, transform=squares, batch_size=BATCH, threads=THREADS).to(device)

    def run(shards: Path, out: Path) -> None:
        run_stage(stage, shards, out)

    return run


def encode_barely(backbone: Backbone, resolution: int, device: str) -> Callable[[Path, Path], None]:
    """As many threads decode, the same autoencoder encodes, and each tar gives one file of numbers."""

    def picture(content: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        side, left, top = min(image.size), *((length - min(image.size)) // 2 for length in image.size)
        box = (left, top, left + side, top + side)
        square = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div_(127.5).sub_(1)

    def run(shards: Path, out: Path) -> None:
        out.mkdir()
        with ThreadPoolExecutor(THREADS) as pool, torch.inference_mode():
            for shard in sorted(shards.glob("*.tar")):
                with tarfile.open(shard) as tar:
                    contents = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".jpg")]
                pictures, latents = pool.map(picture, contents), []
                for _ in range(0, len(contents), BATCH):
                    images = torch.stack([each for each, _ in zip(pictures, range(BATCH), strict=False)])
                    latents.append(backbone.encode_moments(images.to(device)).half())
                np.save(out / f"{shard.stem}.npy", torch.cat(latents).cpu().numpy())

    return run


def ratio(name: str, sides: dict[str, Callable[[Path], None]], *, count: int, rounds: int, folder: Path) -> None:
    """Runs two sides in turns, ours first in even rounds, and prints pictures per second and the median ratio."""
    ratios = []
    for number in range(-1, rounds):  # one to warm up
        speeds = {}
        for side in sides if number % 2 == 0 else reversed(sides):
            out = folder / f"{name}-{number}-{side}"
            began = time.perf_counter()
            sides[side](out)
            speeds[side] = count / (time.perf_counter() - began)
            shutil.rmtree(out)
        if number >= 0:
            ratios.append(speeds["ours"] / speeds["bare"])
            told = ", ".join(f"{side} {speed:.1f} pictures/s" for side, speed in sorted(speeds.items()))
            print(f"{name} round {number}: {told}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"{name}: median ratio {statistics.median(ratios):.3f} of {rounds} rounds of {count} pictures (goal 0.9)")


def main() -> None:
    """Measures both and prints each pair and the median ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=256, help="px of the squares that are encoded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, such as backbone=sdxl")
    given = parser.parse_args()
    cfg = compose("train", [*(given.overrides or ["backbone=tiny_sd15"]), "run=."])
    backbone = open_part(OmegaConf.to_container(cfg.backbone, resolve=True), "autoencoder")
    shared = {"count": given.count, "rounds": given.rounds}
    shard_size = max(1, given.count // 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root, shards = folder / "pictures", folder / "shards"
        make_folder(root, given.count)
        sides = {
            "ours": lambda out: convert(root, out, shard_size),
            "bare": lambda out: convert_barely(root, out, shard_size),
        }
        ratio("conversion", sides, folder=folder, **shared)
        convert(root, shards, shard_size)
        ours, bare = (side(backbone, given.resolution, given.device) for side in (encode, encode_barely))
        ratio(
            "latents",
            {"ours": lambda out: ours(shards, out), "bare": lambda out: bare(shards, out)},
            folder=folder,
            **shared,
        )


if __name__ == "__main__":
    main()
