"""The layout file of the published rich-context demo, turned into the JSON form of a scene.

It holds `bboxes`, [left, top, right, bottom] in pixels of a square of 512, and `labels`, a sentence for each; the demo takes its
caption from elsewhere, so a file may have one or not. ``forms`` tells the forms apart; a scene's own is in ``scene.schema.json``.
"""

from typing import Any

from scenes.checks import SceneError, check_keys, check_type

SIDE = 512  # px
KEYS = ("bboxes", "labels", "caption")


def is_pixel_layout(data: Any) -> bool:
    """Whether the content of a JSON file is of this form: it has keys that no scene has, and none that a scene needs."""
    return isinstance(data, dict) and bool({"bboxes", "labels"} & data.keys()) and "id" not in data


def scene_json(data: dict[str, Any], *, name: str, where: str) -> dict[str, Any]:
    """The same layout as a scene's JSON.

    Args:
        data: The content of the file.
        name: Id of the scene.
        where: The file, for the message of an error.

    Returns:
        What ``Scene.from_json`` takes: boxes in [0, 1], the sentences as phrases, the frame of the square.

    Raises:
        SceneError: A key is unknown or missing, there are more boxes than labels or fewer, a label is no text, or a
            box is no four numbers, has no area, leaves the square or is given in parts of it.
    """
    check_keys(data, KEYS, KEYS[:2], where, "")
    boxes, labels = (check_type(data[key], list, where, key) for key in KEYS[:2])
    if len(boxes) != len(labels):
        raise SceneError(f"{where}: bboxes, labels: {len(boxes)} boxes for {len(labels)} labels; give one for each")
    for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if not isinstance(label, str) or not label.strip():
            raise SceneError(f"{where}: labels[{index}]: {label!r} is not a text; give the object's sentence")
        if (fault := _fault(box)) is not None:
            raise SceneError(f"{where}: bboxes[{index}]: {box} {fault}")
    if boxes and max(max(box) for box in boxes) <= 1:
        raise SceneError(
            f"{where}: bboxes: none reaches beyond 1, and this form has pixels of a square of {SIDE}; "
            f"multiply them by {SIDE}, or write a scene (scene.schema.json)"
        )
    objects = [
        {"phrase": label, "box": [side / SIDE for side in box]} for box, label in zip(boxes, labels, strict=True)
    ]
    caption = check_type(data.get("caption", ""), str, where, "caption")
    return {"id": name, "caption": caption, "objects": objects, "frame": {"original": [SIDE, SIDE]}}


def _fault(box: Any) -> str | None:
    """What is wrong with a box, and the way out; None for a sound one."""
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(isinstance(side, int | float) and not isinstance(side, bool) for side in box):
        return "is not a box; give [left, top, right, bottom] in pixels"
    left, top, right, bottom = box
    if not (left >= 0 and top >= 0 and right <= SIDE and bottom <= SIDE):  # True for NaN
        return f"leaves the square of {SIDE} pixels; cut it, or scale the boxes to that square"
    if not (left < right and top < bottom):
        return "has no area or is inverted; give [left, top, right, bottom]"
    return None
