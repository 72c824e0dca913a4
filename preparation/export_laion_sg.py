"""Shards as LAION-SG's JSON, `train.json` with pictures in `data/`, as `datamodules/sources/laion_sg.py` reads them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.shard_index import ShardError, read_index
from datamodules.sources.laion_sg import NAME
from datamodules.storage import folder_at
from preparation.export_files import (
    count_untold,
    is_file_name,
    named_samples,
    picture_bytes,
    picture_kind,
    whole_folder,
)
from preparation.stage import Sample
from scenes import Scene, SceneObject

FILE, IMAGES = "train.json", "data"
_UNTOLD = ("boxes", "scores", "masks", "descriptions")
_SUFFIXES = {"jpg": (".jpg", ".jpeg"), "png": (".png",)}


def export_laion_sg(shards: str | Path, out: str | Path, *, pictures: bool = True) -> Counter[str]:
    """Write the scene graphs of shards as LAION-SG's, all or none.

    Ids of items and relations are numbered anew, from 0 in each entry and from 0 in the file.

    Args:
        shards: The shards.
        out: The folder to make.
        pictures: Whether the pictures are written too, byte for byte; without them entries name the published ones.

    Returns:
        How many "entries", "items" and "relations" were written, and what was left out or told otherwise by reason.

    Raises:
        ShardError: `out` is there, the shards cannot be read, or two scenes have pictures of one name.
    """
    index = read_index(folder_at(shards))
    if pictures and "image" not in index["provides"]:
        raise ShardError(f"shards={shards}: hold no pictures; set export.pictures=false")
    counts: Counter[str] = Counter(entries=0, items=0, relations=0)
    names: set[str] = set()
    with whole_folder(Path(out)) as folder:
        (folder / IMAGES).mkdir()
        with (folder / FILE).open("w", encoding="ascii") as file:
            file.write("[")
            for _, sample in named_samples(shards, index, counts):
                name = _picture_name(sample, pictures=pictures)
                if pictures:
                    if name in names:
                        raise ShardError(
                            f"scene {sample.scene.id}: its picture {name} is there twice; give each its own"
                        )
                    names.add(name)
                    (folder / IMAGES / name).write_bytes(picture_bytes(sample))
                entry = _entry(sample.scene, name, counts)
                file.write(("," if counts["entries"] else "") + "\n" + json.dumps(entry, indent=1))
                counts["entries"] += 1
            file.write("\n]\n")
    return counts


def _entry(scene: Scene, name: str, counts: Counter[str]) -> dict[str, Any]:
    """A scene as an entry; `counts` are of the entries before it."""
    count_untold(scene, _UNTOLD, counts)
    more = {
        "captions missing": not scene.caption,
        "entries without relations, which the published loader passes over": not scene.relations,
    }
    counts.update({reason: 1 for reason, is_so in more.items() if is_so})
    first, first_relation = counts["items"], counts["relations"]
    counts.update({"items": len(scene.objects), "relations": len(scene.relations)})
    return {
        "img_id": scene.id,
        "name": name,
        "caption_ori": scene.caption,
        "score": scene.provenance.get("score", ""),
        "url": scene.provenance.get("url", ""),
        "items": [
            {"item_id": place, **_item(item, counts), "global_item_id": first + place}
            for place, item in enumerate(scene.objects)
        ],
        "relations": [
            {
                "triple_id": place,
                "item1": relation.subject,
                "relation": relation.predicate,
                "item2": relation.object,
                "global_relation_id": first_relation + place,
            }
            for place, relation in enumerate(scene.relations)
        ],
    }


def _item(item: SceneObject, counts: Counter[str]) -> dict[str, Any]:
    """Label and attributes of an item, of which the published loader makes its phrase."""
    if item.label and item.phrase == " ".join((*item.attributes, item.label)):
        return {"label": item.label, "attributes": list(item.attributes)}
    if item.label or item.attributes:
        counts["phrases that are not attributes and label, told as labels"] += 1
    return {"label": item.phrase, "attributes": []}


def _picture_name(sample: Sample, *, pictures: bool) -> str:
    """The published name of its picture, where there is one and what is written is of that kind."""
    scene, kind = sample.scene, picture_kind(sample)
    name = str(scene.provenance.get(NAME, ""))
    fits = is_file_name(name) and PurePosixPath(name).suffix.lower() in _SUFFIXES[kind]
    return name if name and (fits or not pictures) else f"{scene.id}.{kind}"
