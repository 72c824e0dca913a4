"""Samples of LAION-SG: images with scene graphs."""

import io
from pathlib import Path
from typing import Any

from scripts.samples.drawing import Drawn, draw
from scripts.samples.files import UNICODE, jpeg, size_of, write_bytes, write_json

STREAM, COUNT = 2, 29
FEW, EMPTY, MISSING = 24, 26, 28  # entries from here on have few relations; one has none; one has no image


def write_laion_sg(root: Path) -> None:
    """Images and `train.json`; 24 of them have more than four relations, one has none, and one is not there."""
    entries, relations = [], 0
    for number in range(COUNT):
        few = number >= FEW
        one = draw(number, size_of(number), 5 if few else 4 + number % 3, stream=STREAM)
        kind = {5: "png", 9: "cmyk", 13: "grey"}.get(number, "jpg")
        name = f"{40_000 + 137 * number}.{'png' if kind == 'png' else 'jpg'}"
        if number != MISSING:
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
        if number == EMPTY:
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
