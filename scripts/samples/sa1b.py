"""Samples of SA-1B, and of IGLIGEN's detections and latents of it."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from scripts.samples.drawing import Drawn, draw
from scripts.samples.files import UNICODE, jpeg, run_lengths, size_of, xywh

STREAM, SHARDS, PER_SHARD = 1, 2, 14
LATENTS_1024 = 4  # of each shard: they are large


def sa1b_shard(shard: int) -> dict[int, Drawn]:
    """The drawn images of a tar by SA-1B's number."""
    numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
    return {1 + 17 * n + 11186 * shard: draw(n, size_of(n), 3 + n % 4, stream=STREAM) for n in numbers}


def write_sa1b(root: Path) -> None:
    """Tars of images and masks, with a table of captions; the last image but one of each tar has no caption."""
    rows = []
    for shard in range(SHARDS):
        drawn = sa1b_shard(shard)
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / f"sa_{shard:06d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for place, (number, one) in enumerate(drawn.items()):
                mode = "L" if place == 5 else "RGB"
                for suffix, data in (("jpg", jpeg(one.image.convert(mode))), ("json", sa1b_record(number, one))):
                    member = tarfile.TarInfo(f"./sa_{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                if place != PER_SHARD - 2:
                    text = UNICODE if place == 3 else one.caption
                    rows.append({"key": f"sa_{number}", "caption": f"The image features {text}"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "captions.parquet")


def sa1b_record(number: int, one: Drawn) -> bytes:
    """SA-1B's JSON of an image: masks without names."""
    annotations = [
        {
            "id": 1000 * number + place,
            "segmentation": run_lengths(thing.mask(one.size)),
            "bbox": xywh(thing.box),
            "area": int(thing.mask(one.size).sum()),
            "predicted_iou": 0.95,
            "stability_score": 0.97,
            "crop_box": [0, 0, one.size[1], one.size[0]],
            "point_coords": [[(thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2]],
        }
        for place, thing in enumerate(one.things)
    ]
    image = {"image_id": number, "width": one.size[1], "height": one.size[0], "file_name": f"sa_{number}.jpg"}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def write_igligen(root: Path) -> None:
    """Detections in the centre square and random latents of it, 512 and 1024 px; the last image of a shard has no boxes."""
    rng = np.random.default_rng(11)
    for shard in range(SHARDS):
        drawn = sa1b_shard(shard)
        name = f"sa_{shard:06d}.npy"
        rows = [[number, *detections(number, one), one.size] for number, one in list(drawn.items())[:-1]]
        save_objects(root / "boxes_without_size" / name, [row[:5] for row in rows])
        save_objects(root / "extra_info" / name, [[row[0], row[5]] for row in rows])
        for side, kept in ((512, PER_SHARD), (1024, LATENTS_1024)):
            numbers = [*list(drawn)[: kept - 1], list(drawn)[-1]]
            cells = side // 8
            latents = (0.9 * rng.standard_normal((kept, 4, cells, cells))).astype(np.float16)
            folder = root / f"sdxl-{side}"
            save_objects(folder / "boxes" / name, rows[: kept - 1])
            (folder / "latents").mkdir(parents=True, exist_ok=True)
            content = np.array({"indices": numbers, "latents": latents}, dtype=object)
            np.save(folder / "latents" / name, content, allow_pickle=True)


def detections(number: int, one: Drawn) -> tuple[str, np.ndarray, np.ndarray, list[str]]:
    """Caption, boxes cxcywh of the centre square (beyond it, too), scores and phrases; the last of every third is not sure."""
    side = min(one.size)
    top, left = ((length - side) // 2 for length in one.size)
    found = []
    for thing in one.things:
        x0, y0, x1, y1 = np.array(thing.box, float) - [left, top, left, top]
        if min(x1, side) - max(x0, 0) > side / 6 and min(y1, side) - max(y0, 0) > side / 6:
            found.append((thing.phrase, [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]))
    boxes = np.array([box for _, box in found]) / side
    scores = np.random.default_rng([STREAM, number]).uniform(0.3, 0.9, len(found))
    if number % 3 == 0:
        boxes, scores = np.vstack([boxes, [[0.5, 0.5, 0.3, 0.3]]]), np.append(scores, 0.2)
        found.append(("shadow", []))
    return one.caption, boxes.astype(np.float16), scores.astype(np.float16), [phrase for phrase, _ in found]


def save_objects(path: Path, rows: list[list[Any]]) -> None:
    """Save rows of unlike things as a two-dimensional array of objects."""
    table = np.empty((len(rows), len(rows[0])), dtype=object)
    for place, row in enumerate(rows):
        for column, value in enumerate(row):
            table[place, column] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, table, allow_pickle=True)
