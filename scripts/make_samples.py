"""Writes the samples of the published forms that the tests read: `python -m scripts.make_samples [DIR]`.

DIR is `tests/samples` if not given. Every image is drawn (`scripts.drawn_images`), latents and embeddings are random, and the same
files come out each time. What the published forms are is said where they are read, in `datamodules/sources`. On purpose among
them are: crowds, images without objects, with many, with a tiny one, with four persons, in grey, in CMYK and with transparency, of many sizes,
captions in other scripts, detections that are not sure and that leave their square, ids without boxes or caption, an entry whose
image is missing, relations given twice, none, and objects that no relation names.
"""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.drawn_images import Drawn, draw

FOLDER = Path("tests/samples")
SIZES = (
    (96, 128),
    (128, 96),
    (120, 160),
    (112, 112),
    (150, 100),
    (100, 150),
    (128, 192),
    (96, 144),
)  # (height, width) px
UNICODE = "Un chien à côté d’une balle, 犬とボール – собака 🐕"
STREAMS = {"coco": 0, "sa1b": 1, "laion_sg": 2, "cc3m": 3}
COCO_IDS = [
    n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
]  # of the 80 kinds, in their order
COCO_KINDS = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench|bird|"
    "cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|"
    "sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|"
    "bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|"
    "toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|"
    "teddy bear|hair drier|toothbrush"
).split("|")
STUFF = {124: "grass", 157: "sky-other", 183: "other"}
COCO_COUNT, SHARDS, PER_SHARD, GRAPHS, CC3M_COUNT, RC_COCO_COUNT = 28, 2, 14, 29, 24, 24
CROWDED, EMPTY, PERSONS, TINY, GREY, CMYK = 24, 25, 26, 27, 2, 3  # images of COCO with something special
LATENTS_1024 = 4  # of each shard: they are large
SIDE = 768  # of CC3M's images with their border, px


def main(folder: str = str(FOLDER)) -> None:
    """Write all samples into a folder."""
    root = Path(folder)
    images = coco_images()
    write_coco(images, root / "coco")
    write_gligen_coco(images, root / "gligen_coco")
    write_rc_coco(images, root / "rc_coco")
    write_sa1b(root / "sa1b")
    write_igligen(root / "igligen")
    write_laion_sg(root / "laion_sg")
    write_cc3m(root / "cc3m")


def size_of(number: int) -> tuple[int, int]:
    """(height, width) px of an image."""
    return SIZES[number % len(SIZES)]


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")


def jpeg(image: Image.Image) -> bytes:
    """The image as a small JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85, optimize=True)
    return out.getvalue()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def counts_of(mask: np.ndarray) -> list[int]:
    """Run lengths of 0s and 1s in turn, column after column."""
    flat = mask.T.reshape(-1)
    edges = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    return [0] * bool(flat[0]) + np.diff(edges).tolist()


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed form, by its own library."""
    from pycocotools import mask as published

    return published.encode(np.asfortranarray(mask, np.uint8)) | {"size": list(mask.shape)}


def text_of(mask: np.ndarray) -> dict[str, Any]:
    """The same with the run lengths as text, as JSON files have them."""
    lengths = run_lengths(mask)
    return {"size": lengths["size"], "counts": lengths["counts"].decode("ascii")}


def xywh(box: tuple[int, ...]) -> list[int]:
    """The box as x, y, width, height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


# COCO, GLIGEN's list of it, and rich labels of it


def coco_images() -> dict[int, Drawn]:
    """The drawn images by COCO's number."""
    names: dict[int, list[str] | int] = {CROWDED: 9, EMPTY: [], PERSONS: ["person"] * 4 + ["dog"]}
    drawn = [draw(n, size_of(n), names.get(n, 2 + n % 4), stream=STREAMS["coco"]) for n in range(COCO_COUNT)]
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
            things.append(annotation(len(things), name, COCO_IDS[COCO_KINDS.index(thing.name)], box, [polygon], area))
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
    kinds = [{"supercategory": "thing", "id": n, "name": kind} for n, kind in zip(COCO_IDS, COCO_KINDS, strict=True)]
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
    for name, one in list(images.items())[:RC_COCO_COUNT]:
        factor = SIDE / max(one.size)
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


# SA-1B and IGLIGEN's files of it


def sa1b_shard(shard: int) -> dict[int, Drawn]:
    """The drawn images of a tar by SA-1B's number."""
    numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
    return {1 + 17 * n + 11186 * shard: draw(n, size_of(n), 3 + n % 4, stream=STREAMS["sa1b"]) for n in numbers}


def write_sa1b(root: Path) -> None:
    """Tars of images and masks, with a table of captions; the last image but one of each tar has no caption."""
    import pyarrow
    from pyarrow import parquet

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
            "segmentation": text_of(thing.mask(one.size)),
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
    """Detections in the centre square and random latents of it, for 512 and 1024 px; the last image of each shard has no boxes."""
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


def save_objects(path: Path, rows: list[list[Any]]) -> None:
    """Save rows of unlike things as a two-dimensional array of objects."""
    table = np.empty((len(rows), len(rows[0])), dtype=object)
    for place, row in enumerate(rows):
        for column, value in enumerate(row):
            table[place, column] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, table, allow_pickle=True)


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
    scores = np.random.default_rng([STREAMS["sa1b"], number]).uniform(0.3, 0.9, len(found))
    if number % 3 == 0:
        boxes, scores = np.vstack([boxes, [[0.5, 0.5, 0.3, 0.3]]]), np.append(scores, 0.2)
        found.append(("shadow", []))
    return one.caption, boxes.astype(np.float16), scores.astype(np.float16), [phrase for phrase, _ in found]


# LAION-SG


def write_laion_sg(root: Path) -> None:
    """Images and `train.json`; 24 of them have more than four relations, one has none, and one is not there."""
    entries, relations = [], 0
    for number in range(GRAPHS):
        few = number >= 24
        one = draw(number, size_of(number), 5 if few else 4 + number % 3, stream=STREAMS["laion_sg"])
        kind = {5: "png", 9: "cmyk", 13: "grey"}.get(number, "jpg")
        name = f"{40_000 + 137 * number}.{'png' if kind == 'png' else 'jpg'}"
        if number != GRAPHS - 1:
            write_bytes(root / "data" / name, laion_image(one, kind))
        items = [
            {
                "item_id": place,
                "label": thing.name,
                "attributes": [[thing.colour], [thing.colour, "large"], []][(number + place) % 3],
                "global_item_id": 10 * number + place,
            }
            for place, thing in enumerate(one.things)
        ]
        found = graph(one, pairs=[(0, 1), (2, 1)] if few else [(0, 1), (2, 1), (3, 0), (2, 3), (1, 3), (2, 0)])
        if number % 6 == 1:
            found.append(dict(found[0]))  # given twice
        if number == 26:
            found = []
        for place, relation in enumerate(found):
            relation |= {"triple_id": place, "global_relation_id": relations + place}
        relations += len(found)
        entries.append(
            {
                "img_id": name.partition(".")[0],
                "name": name,
                "caption_ori": UNICODE if number == 3 else one.caption,
                "score": round(5 + number / 20, 2),
                "url": "",
                "items": items,
                "relations": found,
            }
        )
    write_json(root / "train.json", entries)


def laion_image(one: Drawn, kind: str) -> bytes:
    """The image as a file: PNG with a transparent corner, or JPEG in RGB, grey or CMYK."""
    if kind != "png":
        return jpeg(one.image.convert({"cmyk": "CMYK", "grey": "L"}.get(kind, "RGB")))
    image, out = one.image.convert("RGBA"), io.BytesIO()
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def graph(one: Drawn, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Where the first object of each pair lies, seen from the second."""
    centres = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (thing.box for thing in one.things)]
    found = []
    for first, second in pairs:
        x, y = centres[first][0] - centres[second][0], centres[first][1] - centres[second][1]
        side = ("right of" if x > 0 else "left of") if abs(x) > abs(y) else ("below" if y > 0 else "above")
        found.append({"item1": first, "relation": side, "item2": second})
    return found


# CC3M with rich labels


def write_cc3m(root: Path) -> None:
    """An img2dataset tree with a white border, rich labels with masks, the list of captions and a layout for the demo."""
    listed = []
    for number in range(CC3M_COUNT):
        height, width = size_of(number)
        factor = SIDE / max(height, width)
        size = round(height * factor), round(width * factor)
        one = draw(number, size, 2 + number % 5, stream=STREAMS["cc3m"])
        key, caption = f"{number:09d}", UNICODE if number == 5 else one.caption
        left, top = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
        padded = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
        padded.paste(one.image, (left, top))
        file = f"cc3m-images/00000/{key}.jpg"
        write_bytes(root / file, jpeg(padded.convert("L" if number == 7 else "RGB")))
        (root / f"cc3m-images/00000/{key}.txt").write_text(caption, encoding="utf-8")
        sizes = {"width": SIDE, "height": SIDE, "original_width": width, "original_height": height}
        write_json(
            root / f"cc3m-images/00000/{key}.json", {"key": key, "caption": caption, **sizes, "status": "success"}
        )
        label = {"caption": caption, "file_name": file, "is_det": 0, "dataset_name": "cc3m", "data_id": 1}
        annotations = [rich_annotation(one, place, left, top) for place in range(len(one.things))]
        write_json(root / f"labels/batch_0/label_{key}.json", {**label, "annos": annotations})
        listed.append({"image": file, "caption": caption})
    write_json(root / "process_0.json", listed, indent=1)
    demo = draw(CC3M_COUNT, (512, 512), 5, stream=STREAMS["cc3m"])
    layout = {"bboxes": [thing.box for thing in demo.things], "labels": [f"A {t.phrase}; drawn." for t in demo.things]}
    write_json(root / "demo_layout.json", layout, indent=1)


def rich_annotation(one: Drawn, place: int, left: int, top: int) -> dict[str, Any]:
    """A rich label's annotation of an object, in px of the image with its border."""
    thing = one.things[place]
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + one.size[0], left : left + one.size[1]] = thing.mask(one.size)
    x, y, width, height = xywh(thing.box)
    return {
        "id": 0,
        "isfake": 0,
        "isreflected": 0,
        "bbox": [x + left, y + top, width, height],
        "mask_value": place + 1,
        "mask": text_of(mask),
        "pred_score": round(0.3 + 0.6 * ((7 * place + 3) % 10) / 10, 2),
        "category_id": 0,
        "data_id": 0,
        "category_name": thing.name,
        "text_embedding_before": "",
        "caption": f"A {thing.phrase} with {len(thing.outline)} corners.",
        "blip_clip_embeddings": "",
        "is_stuff": 0,
        "is_thing": 1,
        "area": width * height,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
