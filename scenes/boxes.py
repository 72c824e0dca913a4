"""Arithmetic on boxes: forms, units, clipping, mirroring, cropping, overlap.

Every function takes a numpy array or a torch tensor whose last axis holds the four numbers of a box and
gives back the same kind. The project's own form is ``xyxy`` (left, top, right, bottom) in [0, 1] of the
current frame; other forms and pixels exist only where published files are read or written. What a box
belongs to (phrase, scene) lives in ``scene.py``, which cells of a picture it covers in ``regions.py``.

Legend: N, M boxes; … any leading axes.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch

Boxes = TypeVar("Boxes", np.ndarray, torch.Tensor)
Form = Literal["xyxy", "xywh", "cxcywh"]
FORMS = ("xyxy", "xywh", "cxcywh")


def to_xyxy(boxes: Boxes, form: Form) -> Boxes:
    """Convert boxes from ``form`` to xyxy.

    Args:
        boxes: (…, 4), any unit.
        form: ``xyxy`` (corners), ``xywh`` (left, top, width, height; COCO) or ``cxcywh`` (centre and size).

    Returns:
        (…, 4) xyxy in the same unit.

    Raises:
        ValueError: ``form`` is none of these, or the last axis is not four long.
    """
    a, b, c, d = _parts(boxes, form)
    if form == "xywh":
        return _join(a, b, a + c, b + d)
    if form == "cxcywh":
        return _join(a - c / 2, b - d / 2, a + c / 2, b + d / 2)
    return boxes


def from_xyxy(boxes: Boxes, form: Form) -> Boxes:
    """Convert xyxy boxes to ``form``; the inverse of :func:`to_xyxy`.

    Args:
        boxes: (…, 4) xyxy, any unit.
        form: See :func:`to_xyxy`.

    Returns:
        (…, 4) in ``form`` and the same unit.

    Raises:
        ValueError: ``form`` is unknown, or the last axis is not four long.
    """
    x0, y0, x1, y1 = _parts(boxes, form)
    if form == "xywh":
        return _join(x0, y0, x1 - x0, y1 - y0)
    if form == "cxcywh":
        return _join((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
    return boxes


def normalise(boxes_px: Boxes, size_hw: Sequence[int]) -> Boxes:
    """Pixels to [0, 1]: boxes (…, 4) xyxy in pixels of a picture of ``size_hw`` = (height, width)."""
    return boxes_px / _scale(boxes_px, size_hw)


def denormalise(boxes: Boxes, size_hw: Sequence[int]) -> Boxes:
    """[0, 1] to pixels of a picture of ``size_hw`` = (height, width): the inverse of :func:`normalise`."""
    return boxes * _scale(boxes, size_hw)


def clip(boxes: Boxes) -> Boxes:
    """Cut xyxy boxes (…, 4) to the unit square; a box outside it becomes one of zero area on its border."""
    return boxes.clip(0, 1)


def flip(boxes: Boxes) -> Boxes:
    """Mirror xyxy boxes (…, 4) in [0, 1] left to right."""
    x0, y0, x1, y1 = _parts(boxes, "xyxy")
    return _join(1 - x1, y0, 1 - x0, y1)


def crop(boxes: Boxes, window: Sequence[float]) -> Boxes:
    """Express xyxy boxes in the frame of a window; nothing is clipped.

    Args:
        boxes: (…, 4) in [0, 1] of the old frame.
        window: The xyxy corners, in [0, 1] of the old frame, that become (0, 0, 1, 1).

    Returns:
        (…, 4) xyxy in [0, 1] of the window, beyond it where a box leaves the window.

    Raises:
        ValueError: The window has no area.
    """
    left, top, right, bottom = (float(v) for v in window)
    if not (left < right and top < bottom):
        raise ValueError(f"window={tuple(window)} has no area; give xyxy with left < right and top < bottom")
    x0, y0, x1, y1 = _parts(boxes, "xyxy")
    width, height = right - left, bottom - top
    return _join((x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height)


def area(boxes: Boxes) -> Boxes:
    """Area (…,) of xyxy boxes (…, 4), in the square of their unit; an inverted box has none."""
    x0, y0, x1, y1 = _parts(boxes, "xyxy")
    return (x1 - x0).clip(min=0) * (y1 - y0).clip(min=0)


def iou(a: Boxes, b: Boxes) -> Boxes:
    """Intersection over union (N, M) in [0, 1] of every box of ``a`` (N, 4) with every ``b`` (M, 4)."""
    return pairwise_iou(a[:, None, :], b[None, :, :])


def pairwise_iou(a: Boxes, b: Boxes) -> Boxes:
    """Intersection over union (…,) in [0, 1] of each box of ``a`` (…, 4) with its partner in ``b`` (…, 4).

    Partners stand at the same place; leading axes broadcast. Two boxes without area have overlap 0, not NaN.
    """
    ax0, ay0, ax1, ay1 = _parts(a, "xyxy")
    bx0, by0, bx1, by1 = _parts(b, "xyxy")
    lib: Any = torch if isinstance(a, torch.Tensor) else np
    width = (lib.minimum(ax1, bx1) - lib.maximum(ax0, bx0)).clip(min=0)
    height = (lib.minimum(ay1, by1) - lib.maximum(ay0, by0)).clip(min=0)
    shared = width * height
    union = area(a) + area(b) - shared
    return shared / lib.where(union > 0, union, lib.ones_like(union))


def _parts(boxes: Boxes, form: str) -> tuple[Any, Any, Any, Any]:
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not a form of boxes; use one of {', '.join(FORMS)}")
    if boxes.shape[-1] != 4:
        raise ValueError(f"boxes of shape {tuple(boxes.shape)} are not boxes; the last axis must have length 4")
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def _join(*parts: Any) -> Any:
    return torch.stack(parts, -1) if isinstance(parts[0], torch.Tensor) else np.stack(parts, -1)


def _scale(boxes: Any, size_hw: Sequence[int]) -> Any:
    height, width = size_hw
    if isinstance(boxes, torch.Tensor):
        dtype = boxes.dtype if boxes.is_floating_point() else torch.get_default_dtype()
        return torch.tensor([width, height, width, height], dtype=dtype, device=boxes.device)
    return np.array([width, height, width, height], boxes.dtype if boxes.dtype.kind == "f" else np.float64)
