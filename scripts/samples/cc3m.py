"""Samples of CC3M: img2dataset's tree with a white border, and rich labels."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.samples.drawing import Drawn, draw
from scripts.samples.files import UNICODE, jpeg, run_lengths, size_of, write_bytes, write_json, xywh

STREAM, COUNT = 3, 24
SIDE = 768  # of the images with their border, px


def write_cc3m(root: Path) -> None:
    """An img2dataset tree with a white border, rich labels with masks, the list of captions and a layout for the demo."""
    listed = []
    for number in range(COUNT):
        height, width = size_of(number)
        factor = SIDE / max(height, width)
        size = round(height * factor), round(width * factor)
        one = draw(number, size, 2 + number % 5, stream=STREAM)
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
    demo = draw(COUNT, (512, 512), 5, stream=STREAM)
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
        "mask": run_lengths(mask),
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
