"""Scenes as label files in the published forms: `label_KEY.json` of rich context, and GLIGEN-COCO's pickled list.

Both are read by their sources, `datamodules/sources/rich_context.py` and `gligen_coco.py`, and hold what those forms hold: no
relations, no attributes, no provenance. How labels come about is in ``label.py``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.shard_index import ShardError, read_index
from datamodules.storage import folder_at
from preparation.export_files import WITHOUT_BOX, named_samples, picture_bytes, picture_kind, whole_folder
from preparation.stage import Sample
from scenes import Scene, SceneObject
from scenes import masks as mask_math

FORMS = ("rich_context", "gligen_coco")
LIST, IMAGES, META = "coco_train2017.pth", "train2017", "meta.json"
_WITHOUT_BOXES = "pictures without boxes"

Embed = Callable[[Sequence[str]], np.ndarray]


def export_labels(
    shards: str | Path,
    out: str | Path,
    *,
    form: str = "rich_context",
    pictures: bool = True,
    whole_pixels: bool = True,
    embed: Embed | None = None,
) -> Counter[str]:
    """Write the labels of shards as published files, all or none.

    Args:
        shards: The shards.
        out: The folder to make. For rich context: a folder for each shard with `label_ID.json`, and `meta.json`, the list of
            pairs [picture, label]. For GLIGEN-COCO: the list, with pictures in `train2017/`.
        form: "rich_context" or "gligen_coco".
        pictures: Whether the pictures are written too, byte for byte. Without them the labels are for the published ones: where
            a scene tells of the border that its picture had there, boxes and masks are put back into it.
        whole_pixels: Whether rich context's boxes are rounded to pixels, as the published ones are.
        embed: For GLIGEN-COCO: what gives N phrases their (N, 768) `text_embeddings_before_projection`, which the published
            loader needs and this project's does not.

    Returns:
        How many "pictures" and "objects" were written, and what was left out by reason.

    Raises:
        ValueError: The form is unknown.
        ShardError: `out` is there, the shards cannot be read, or a scene cannot be told in the form.
    """
    if form not in FORMS:
        raise ValueError(f"export.form={form}: must be one of {', '.join(FORMS)}")
    index = read_index(folder_at(shards))
    if pictures and "image" not in index["provides"]:
        raise ShardError(f"shards={shards}: hold no pictures; set export.pictures=false")
    counts: Counter[str] = Counter(pictures=0, objects=0)
    with whole_folder(Path(out)) as folder:
        scenes = _shown(named_samples(shards, index, counts), counts)
        if form == "rich_context":
            _write_rich(folder, scenes, pictures=pictures, whole_pixels=whole_pixels, counts=counts)
        else:
            _write_list(folder, scenes, pictures=pictures, embed=embed, counts=counts)
    return counts


def clip_embedding(model: str, *, device: Any = "cpu", revision: str | None = None, batch_size: int = 64) -> Embed:
    """CLIP's pooled text features before its projection, as GLIGEN-COCO's list has them.

    Args:
        model: Name on the hub or local folder of a CLIP text encoder with its tokenizer.
        device: Where it works.
        revision: Branch, tag or commit on the hub.
        batch_size: Phrases at once.

    Returns:
        What gives N phrases (N, C) float32.
    """
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    from files.quiet import quiet_libraries
    from models.text import TextTower, TextTowers

    with quiet_libraries():
        tokenizer = CLIPTokenizer.from_pretrained(model, revision=revision or "main")
        encoder = CLIPTextModel.from_pretrained(model, revision=revision or "main")
    towers = TextTowers([TextTower(tokenizer, encoder)]).eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def embed(phrases: Sequence[str]) -> np.ndarray:
        parts = [phrases[first : first + batch_size] for first in range(0, len(phrases), batch_size)]
        return np.concatenate([towers.encode_phrases(part).pooled.float().cpu().numpy() for part in parts])

    return embed


def rich_label(
    scene: Scene, size: tuple[int, int], *, file_name: str, whole_pixels: bool, padded: bool
) -> dict[str, Any]:
    """A scene in the form of `label_KEY.json`.

    Args:
        scene: The scene; every object with a box has a score.
        size: (height, width) px of its picture.
        file_name: The picture, as the label is to call it.
        whole_pixels: Whether boxes are rounded.
        padded: Whether boxes and masks are put back into the border that the scene's provenance tells of.

    Returns:
        JSON values.

    Raises:
        ShardError: An object has no score.
    """
    border = scene.provenance.get("padded") if padded else None
    window = (0, 0, *size) if border is None else tuple(border["window"])
    whole = size if border is None else tuple(border["size"])
    annotations = []
    for place, item in enumerate(item for item in scene.objects if item.box is not None):
        if item.score is None:
            raise ShardError(
                f"scene {scene.id}: objects: {item.phrase!r} has no score, which form=rich_context needs; "
                "give shards of task=label"
            )
        left, top, right, bottom = _in_pixels(item, window)
        if whole_pixels:
            left, top = min(round(left), whole[1] - 1), min(round(top), whole[0] - 1)
            right, bottom = max(left + 1, round(right)), max(top + 1, round(bottom))
        tag = item.label or item.phrase
        annotations.append(
            {
                "id": 0,
                "isfake": 0,
                "isreflected": 0,
                "bbox": [left, top, right - left, bottom - top],
                "mask_value": place + 1,
                "mask": "" if item.mask is None else _mask_in(item.mask, window, whole, is_padded=border is not None),
                "pred_score": item.score,
                "category_id": 0,
                "data_id": 0,
                "category_name": tag,
                "text_embedding_before": "",
                "caption": item.description or tag,
                "blip_clip_embeddings": "",
                "is_stuff": 0,
                "is_thing": 1,
                "area": (right - left) * (bottom - top),
            }
        )
    return {
        "caption": scene.caption,
        "file_name": file_name,
        "is_det": 0,
        "dataset_name": scene.provenance.get("dataset") or scene.source,
        "data_id": 1,
        "annos": annotations,
    }


def _in_pixels(item: SceneObject, window: Sequence[int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) px of an object in the picture that holds the window (top, left, height, width)."""
    assert item.box is not None
    top, left, height, width = window
    x0, y0, x1, y1 = item.box
    return left + x0 * width, top + y0 * height, left + x1 * width, top + y1 * height


def _mask_in(
    mask: dict[str, Any], window: Sequence[int], whole: Sequence[int], *, is_padded: bool
) -> dict[str, Any] | str:
    """A mask with the border around it; none where it is of another size than the picture."""
    top, left, height, width = window
    if not is_padded:
        return mask
    if list(mask["size"]) != [height, width]:
        return ""
    canvas = np.zeros(tuple(whole), bool)
    canvas[top : top + height, left : left + width] = mask_math.decode(mask)
    return mask_math.encode(canvas)


def _shown(samples: Iterator[tuple[str, Sample]], counts: Counter[str]) -> Iterator[tuple[str, Sample]]:
    """Yield shard and sample of every picture with a box; the others are counted."""
    for shard, sample in samples:
        boxed = sum(item.box is not None for item in sample.scene.objects)
        if lacking := len(sample.scene.objects) - boxed:
            counts[WITHOUT_BOX] += lacking
        if not boxed:
            counts[_WITHOUT_BOXES] += 1
            continue
        counts["pictures"] += 1
        counts["objects"] += boxed
        yield shard, sample


def _write_rich(
    folder: Path, scenes: Iterator[tuple[str, Sample]], *, pictures: bool, whole_pixels: bool, counts: Counter[str]
) -> None:
    pairs = []
    for shard, sample in scenes:
        place = folder / shard
        place.mkdir(exist_ok=True)
        name = sample.scene.id
        picture = _picture_name(sample)
        if pictures:
            (place / picture).write_bytes(picture_bytes(sample))
        padded = not pictures and "padded" in sample.scene.provenance
        size = _size(sample)
        label = rich_label(sample.scene, size, file_name=f"{shard}/{picture}", whole_pixels=whole_pixels, padded=padded)
        if padded:
            lost = sum(item.mask is not None for item in sample.scene.objects if item.box is not None) - sum(
                each["mask"] != "" for each in label["annos"]
            )
            counts.update({"masks of another size than the picture": lost} if lost else {})
        (place / f"label_{name}.json").write_text(json.dumps(label, ensure_ascii=False, indent=1), encoding="utf-8")
        pairs.append([f"{shard}/{picture}", f"{shard}/label_{name}.json"])
    (folder / META).write_text(json.dumps(pairs, ensure_ascii=False, indent=1), encoding="utf-8")


def _write_list(
    folder: Path, scenes: Iterator[tuple[str, Sample]], *, pictures: bool, embed: Embed | None, counts: Counter[str]
) -> None:
    import torch

    images = folder / IMAGES
    images.mkdir()
    entries = []
    for _, sample in scenes:
        scene, size = sample.scene, _size(sample)
        boxed = [item for item in scene.objects if item.box is not None]
        annotations: list[dict[str, Any]] = [
            {"caption": item.phrase, "bbox": list(_in_pixels(item, (0, 0, *size)))} for item in boxed
        ]
        if embed is not None:
            for annotation, row in zip(annotations, embed([item.phrase for item in boxed]), strict=True):
                annotation["text_embeddings_before_projection"] = torch.from_numpy(row.copy())
        if pictures:
            (images / _picture_name(sample)).write_bytes(picture_bytes(sample))
        captions = list(scene.provenance.get("captions") or ([scene.caption] if scene.caption else []))
        counts.update({"captions missing": 1} if not captions else {})
        entries.append({"file_path": _picture_name(sample), "captions": captions, "annos": annotations})
    torch.save(entries, folder / LIST)


def _picture_name(sample: Sample) -> str:
    return f"{sample.scene.id}.{picture_kind(sample)}"


def _size(sample: Sample) -> tuple[int, int]:
    """(height, width) px of the picture."""
    if sample.scene.frame is not None:
        height, width = sample.scene.frame.target
        return height, width
    picture = sample.picture()
    return picture.height, picture.width
