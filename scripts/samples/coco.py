"""Samples of COCO, of GLIGEN's list of detections on it, and of RC-COCO's labels of it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelling.coco_names import COCO_NAMES
from scripts.samples.drawing import Drawn, draw
from scripts.samples.files import UNICODE, jpeg, size_of, write_bytes, write_json, xywh

UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = [number for number in range(1, 91) if number not in UNUSED]  # of the 80 kinds, in their order
STUFF = {124: "grass", 157: "sky-other", 183: "other"}
STREAM, COUNT = 0, 28  # of images
CROWDED, EMPTY, PERSONS, TINY, GREY, CMYK = 24, 25, 26, 27, 2, 3  # images with something special
RICH_COUNT, RICH_SIDE = 24, 768  # images with rich labels, and their long side there, px


def coco_images() -> dict[int, Drawn]:
    """The drawn images by COCO's number."""
    names: dict[int, list[str] | int] = {CROWDED: 9, EMPTY: [], PERSONS: ["person"] * 4 + ["dog"]}
    drawn = [draw(n, size_of(n), names.get(n, 2 + n % 4), stream=STREAM) for n in range(COUNT)]
    drawn[TINY] = drawn[TINY].with_tiny("bird", "black")
    return {1009 + 4721 * n: one for n, one in enumerate(drawn)}


def coco_captions(number: int, image: Drawn) -> list[str]:
    """Five captions as a rule, the first of some with a space at its end; one image has a single one, one has six."""
    short = f"{len(image.things)} things under the sky"
    captions = [
        image.caption.capitalize() + " " * (number % 3 == 0),
        short,
        f"A drawing of {image.caption}",
        "Flat shapes.",
        UNICODE,
    ]
    return {4: captions[:1], 5: [*captions, "A sixth caption."], 6: [UNICODE, *captions[:4]]}.get(number, captions)


def write_coco(images: dict[int, Drawn], root: Path) -> None:
    """Things as polygons, stuff (sky, grass, and "other" where there are no things), crowds as plain run lengths."""
    records, things, stuff, captions = [], [], [], []
    for number, (name, one) in enumerate(images.items()):
        height, width = one.size
        record = {"file_name": f"{name:012d}.jpg", "height": height, "width": width, "id": name, "license": 1}
        records.append(record)
        mode = {GREY: "L", CMYK: "CMYK"}.get(number, "RGB")
        write_bytes(root / "train2017" / record["file_name"], jpeg(one.image.convert(mode)))
        for thing in one.things:
            polygon = [coordinate for corner in thing.outline for coordinate in corner]
            box, area = xywh(thing.box), int(thing.mask(one.size).sum())
            things.append(annotation(len(things), name, COCO_IDS[COCO_NAMES.index(thing.name)], box, [polygon], area))
        if number in (0, 7):
            crowd = np.zeros(one.size, bool)
            crowd[height // 2 : height // 2 + 20, ::3] = True
            lengths = {"counts": counts_of(crowd), "size": list(one.size)}
            item = annotation(len(things), name, 1, [0, height // 2, width, 20], lengths, int(crowd.sum()))
            things.append({**item, "iscrowd": 1})
        rows = {157: (0, one.horizon), 124: (one.horizon, height)} if one.things else {183: (0, height)}
        for category, (top, bottom) in rows.items():
            box = [0, top, width, bottom - top]
            polygon = [0, top, width, top, width, bottom, 0, bottom]
            stuff.append(annotation(10_000_000 + len(stuff), name, category, box, [polygon], width * (bottom - top)))
        captions += [
            {"image_id": name, "id": 100 * number + place, "caption": text}
            for place, text in enumerate(coco_captions(number, one))
        ]
    about = {"info": {"description": "drawn images in COCO's form"}, "licenses": [{"id": 1, "name": "MIT", "url": ""}]}
    kinds = [{"supercategory": "thing", "id": n, "name": kind} for n, kind in zip(COCO_IDS, COCO_NAMES, strict=True)]
    kinds_of_stuff = [{"supercategory": "stuff", "id": n, "name": kind} for n, kind in STUFF.items()]
    for kind, annotations, categories in (
        ("instances", things, kinds),
        ("stuff", stuff, kinds_of_stuff),
        ("captions", captions, []),
    ):
        content = {**about, "images": records, "annotations": annotations, "categories": categories}
        write_json(root / "annotations" / f"{kind}_train2017.json", content)


def annotation(number: int, image: int, category: int, box: list[int], segmentation: Any, area: int) -> dict[str, Any]:
    """An annotation of COCO."""
    return {
        "segmentation": segmentation,
        "area": area,
        "iscrowd": 0,
        "image_id": image,
        "bbox": box,
        "category_id": category,
        "id": number,
    }


def counts_of(mask: np.ndarray) -> list[int]:
    """Run lengths of 0s and 1s in turn, column after column."""
    flat = mask.T.reshape(-1)
    edges = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    return [0] * bool(flat[0]) + np.diff(edges).tolist()


def write_gligen_coco(images: dict[int, Drawn], root: Path) -> None:
    """The list of detections with a text embedding each, of the first images; equal phrases share one embedding."""
    rng = np.random.default_rng(7)
    phrases = sorted({thing.name for one in images.values() for thing in one.things})
    embeddings = {name: torch.tensor(rng.standard_normal(768), dtype=torch.float32) for name in phrases}
    items = [
        {
            "file_path": f"{name:012d}.jpg",
            "captions": [text.strip() for text in coco_captions(number, one)],
            "annos": [
                {
                    "caption": f"a {thing.name}",
                    "bbox": [float(side) for side in thing.box],
                    "text_embeddings_before_projection": embeddings[thing.name],
                }
                for thing in one.things
            ],
        }
        for number, (name, one) in enumerate(images.items())
        if one.things
    ]
    root.mkdir(parents=True, exist_ok=True)
    torch.save(items, root / "coco_train2017.pth")


def write_rc_coco(images: dict[int, Drawn], root: Path) -> None:
    """Rich labels, boxes with the image's long side at 768 px."""
    for name, one in list(images.items())[:RICH_COUNT]:
        factor = RICH_SIDE / max(one.size)
        annotations = [
            {
                "bbox": [round(factor * side) for side in xywh(thing.box)],
                "category_name": thing.name,
                "caption": f"A {thing.phrase} with {len(thing.outline)} corners.",
            }
            for thing in one.things
        ]
        label = {"caption": one.caption.capitalize(), "file_name": f"{name:012d}.jpg", "annos": annotations}
        write_json(root / f"label_{name:012d}.json", label)
