"""Loading from shards, against the same bytes read and decoded with nothing around, and against the published ways to load.

Pictures: the published way opens a picture and a label file for each sample, as the rich-context system does. Latents: it
unpickles a file of latents and one of boxes whole, as IGLIGEN does, each worker its own. "Bare" reads the shards' own bytes at
their offsets and decodes them: JSON, and a picture to the model's size or a latent; no records, no checks, no order. All sides go
through PyTorch's loader with as many workers and give batches as large, from files that the system holds in memory. They take
turns, so that a busy machine slows all. Goals: 0.9 of bare, 5 times the published ways.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from benchmarks.prepare import make_folder
from datamodules.loaders import PositionDataset, PositionLoader
from datamodules.order import SampleOrder
from datamodules.shards import ShardSet
from datamodules.sources.folder import Folder
from datamodules.sources.igligen import Igligen
from datamodules.transforms import SceneTransform
from preparation.conversion import convert_source
from scenes.masks import encode

SHARDS = 4
OBJECTS = 7
RESOLUTION = 512
LATENT = (4, 64, 64)
Load = Callable[[int], Iterator[Any]]  # workers -> batches


def make_labels(root: Path, count: int) -> None:
    """A label file for each picture of `make_folder`, with masks, as the rich-context system keeps them."""
    for number in range(count):
        annotations = []
        for n in range(OBJECTS):
            mask = np.zeros((480, 640), dtype=bool)
            mask[48:336, 64 * n : 64 * n + 192] = True
            annotations.append(
                {
                    "id": n,
                    "bbox": [64 * n, 48, 192, 288],
                    "mask": {"size": [480, 640], "counts": encode(mask)["counts"]},
                    "pred_score": 0.9,
                    "category_name": f"thing {n}",
                    "caption": f"a thing of number {n}, of one colour and standing in a row with the others",
                    "area": 192 * 288,
                }
            )
        label = {"caption": "things in a row", "file_name": f"{number}.jpg", "annos": annotations}
        (root / f"label_{number}.json").write_text(json.dumps(label), encoding="utf-8")


def make_arrays(root: Path, count: int) -> None:
    """Latents and boxes as IGLIGEN publishes them: pickled arrays, one pair of files to a shard."""
    numbers = np.random.default_rng(0)
    for folder in ("latents", "boxes"):
        (root / folder).mkdir(parents=True)
    each = count // SHARDS
    for shard in range(SHARDS):
        ids = list(range(shard * each, (shard + 1) * each))
        latents = numbers.standard_normal((each, *LATENT), dtype=np.float32).astype(np.float16)
        rows = np.empty((each, 6), dtype=object)
        for place, number in enumerate(ids):
            boxes = np.array([[0.1 * n + 0.2, 0.4, 0.2, 0.6] for n in range(OBJECTS)], dtype=np.float16)
            scores = np.full(OBJECTS, 0.9, dtype=np.float16)
            row = [number, "things in a row.", boxes, scores, [f"thing {n}" for n in range(OBJECTS)], (1500, 2250)]
            for column, value in enumerate(row):
                rows[place, column] = value
        np.save(root / "boxes" / f"sa_{shard:06d}.npy", rows, allow_pickle=True)
        content = np.array({"indices": ids, "latents": latents}, dtype=object)
        np.save(root / "latents" / f"sa_{shard:06d}.npy", content, allow_pickle=True)


def from_shards(folder: Path, batch: int, *, first: int = 0) -> Load:
    """Ours, in the order of a run from a position on."""

    def load(workers: int) -> Iterator[Any]:
        shards = ShardSet(folder)
        order = SampleOrder(shards.sizes, seed=0, window=2)
        dataset = PositionDataset(shards, SceneTransform(resolution=RESOLUTION, posterior="sample"), order=order)
        plan = [range(start, start + batch) for start in range(first, len(shards), batch)]
        return iter(PositionLoader(dataset, lambda: plan, length=len(plan), workers=workers))

    return load


class Bare(Dataset[tuple[torch.Tensor, Any]]):
    """The bytes of shards at their offsets, decoded."""

    def __init__(self, folder: Path) -> None:
        self.shards = ShardSet(folder)
        self.is_latent = self.shards.latents is not None
        members = self.shards.index["members"]
        self.content = next(place for place, name in enumerate(members) if name != "scene.json")
        self.scene = members.index("scene.json")
        order = SampleOrder(self.shards.sizes, seed=0, window=2)
        self.places = [order[position] for position in range(len(self.shards))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, Any]:
        shard, row = self.places[position]
        opened = self.shards._opened(shard)
        content, scene = opened.content(row, self.content), json.loads(opened.content(row, self.scene))
        if self.is_latent:
            return torch.from_numpy(np.load(io.BytesIO(content))).float(), scene
        return _square(Image.open(io.BytesIO(content))), scene


class LabelFiles(Dataset[tuple[torch.Tensor, Any]]):
    """A picture and a label file for each sample, opened when it comes, and the boxes of its objects in [0, 1]."""

    def __init__(self, root: Path, count: int) -> None:
        self.root = root
        self.names = np.random.default_rng(0).permutation(count).tolist()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, Any]:
        name = self.names[place]
        with (self.root / f"label_{name}.json").open(encoding="utf-8") as file:
            label = json.load(file)
        image = Image.open(self.root / label["file_name"])
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in label["annos"])])
        boxes = corners / torch.tensor([*image.size, *image.size])
        return _square(image), (boxes, [one["caption"] for one in label["annos"]], label["caption"])


class PickledArrays(IterableDataset[tuple[torch.Tensor, Any]]):
    """Whole shards unpickled one after the other, each worker its own; joined by the picture's number."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(path.name for path in (root / "latents").iterdir())

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        worker = get_worker_info()
        mine = self.names if worker is None else self.names[worker.id :: worker.num_workers]
        for name in mine:
            content = np.load(self.root / "latents" / name, allow_pickle=True).item()
            rows = {row[0]: row for row in np.load(self.root / "boxes" / name, allow_pickle=True)}
            for number, latent in zip(content["indices"], content["latents"], strict=True):
                _, caption, boxes, scores, phrases, size = rows[number]
                kept = np.flatnonzero(scores > 0.25)
                kept = kept[np.argsort(-scores[kept], kind="stable")][:32]
                centres = torch.from_numpy(boxes[kept]).float()
                corners = torch.cat([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], dim=1)
                chosen = [phrases[place] for place in kept]
                yield torch.from_numpy(latent).float(), (corners.clamp(0, 1), chosen, caption, size)


def _square(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1] of the centre square."""
    image = image.convert("RGB")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    square = np.array(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR, box=box))
    return torch.from_numpy(square.transpose(2, 0, 1).copy()).float().div_(127.5).sub_(1)


def through_torch(dataset: Dataset[Any], batch: int) -> Load:
    """Batches of a data set in its order."""

    def collate(samples: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        return torch.stack([tensor for tensor, _ in samples]), [rest for _, rest in samples]

    return lambda workers: iter(DataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=collate))


def compare(name: str, sides: dict[str, Load], *, count: int, rounds: int) -> dict[str, float]:
    """Samples per second of each side with 1, 2 and 4 workers, and the median ratios of ours to the others.

    Args:
        name: what is loaded.
        sides: "ours", "bare" and "published".
        count: samples of one pass.
        rounds: passes of each side that count.

    Returns:
        The fastest median of each side.
    """
    fastest = dict.fromkeys(sides, 0.0)
    for workers in (1, 2, 4):
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(-1, rounds):  # one to warm up
            for side in sides if number % 2 else reversed(sides):
                began = time.perf_counter()
                batches = sum(1 for _ in sides[side](workers))
                if number >= 0 and batches:
                    speeds[side].append(count / (time.perf_counter() - began))
        told = ", ".join(f"{side} {statistics.median(found):.0f}/s" for side, found in speeds.items())
        ratios = {
            side: statistics.median(a / b for a, b in zip(speeds["ours"], speeds[side], strict=True))
            for side in sides
            if side != "ours"
        }
        goals = {"bare": 0.9, "published": 5.0}
        shown = ", ".join(f"{ratio:.2f} of {side} (goal {goals[side]:g})" for side, ratio in ratios.items())
        print(f"{name}, {workers} workers: {told}; ours is {shown}", flush=True)
        fastest = {side: max(fastest[side], statistics.median(found)) for side, found in speeds.items()}
    return fastest


def seconds_to_the_middle(load: Load, skipped: int) -> float:
    """Seconds until the first batch behind some that a loader can only pass over."""
    began = time.perf_counter()
    batches = load(1)
    for _ in range(skipped + 1):
        next(batches)
    return time.perf_counter() - began


def main() -> None:
    """Makes both kinds of data, measures in turns and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root, arrays = folder / "pictures", folder / "arrays"
        make_folder(root, given.pictures)
        make_labels(root, given.pictures)
        convert_source(Folder(root=str(root)), folder / "picture_shards", shard_size=given.pictures // SHARDS)
        make_arrays(arrays, given.latents)
        convert_source(Igligen(root=str(arrays)), folder / "latent_shards", shard_size=given.latents // SHARDS)
        pictures = {
            "ours": from_shards(folder / "picture_shards", 8),
            "bare": through_torch(Bare(folder / "picture_shards"), 8),
            "published": through_torch(LabelFiles(root, given.pictures), 8),
        }
        latents = {
            "ours": from_shards(folder / "latent_shards", 32),
            "bare": through_torch(Bare(folder / "latent_shards"), 32),
            "published": through_torch(PickledArrays(arrays), 32),
        }
        of_pictures = compare("pictures", pictures, count=given.pictures, rounds=given.rounds)
        of_latents = compare("latents", latents, count=given.latents, rounds=given.rounds)
        times = of_latents["ours"] / of_pictures["published"]
        print(
            f"latents made once, against a picture and a label file opened for each sample: {times:.1f} times as many a second"
        )
        middle = given.latents // 32 // 2
        ours = [
            seconds_to_the_middle(from_shards(folder / "latent_shards", 32, first=32 * middle), 0) for _ in range(3)
        ]
        theirs = [seconds_to_the_middle(latents["published"], middle) for _ in range(3)]
        print(
            f"latents, going on in the middle of an epoch: ours {min(ours):.2f} s, published {min(theirs):.2f} s to the batch, "
            f"{min(theirs) / min(ours):.1f} times as fast"
        )


if __name__ == "__main__":
    main()
