"""Box arithmetic: conversions invert, mirrors undo themselves, overlap equals counting."""

import numpy as np
import pytest
import torch

from scenes import boxes as box_math


def random_boxes(*shape: int, seed: int = 0) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(size=(*shape, 2, 2))
    return np.concatenate([corners.min(-2), corners.max(-2)], -1)


@pytest.fixture(params=["numpy", "torch"])
def boxes(request):
    found = random_boxes(3, 5)
    return found if request.param == "numpy" else torch.from_numpy(found)


def same(a, b) -> bool:
    assert type(a) is type(b)
    return bool(np.allclose(np.asarray(a), np.asarray(b), atol=1e-12))


@pytest.mark.parametrize("form", box_math.FORMS)
def test_forms_invert(boxes, form):
    assert same(box_math.to_xyxy(box_math.from_xyxy(boxes, form), form), boxes)
    assert same(box_math.from_xyxy(box_math.to_xyxy(boxes, form), form), boxes)


def test_forms_by_hand():
    box = np.array([1.0, 2.0, 4.0, 8.0])
    assert box_math.from_xyxy(box, "xywh").tolist() == [1, 2, 3, 6]
    assert box_math.from_xyxy(box, "cxcywh").tolist() == [2.5, 5, 3, 6]


def test_an_unknown_form_and_a_wrong_axis_are_refused():
    with pytest.raises(ValueError, match=r"form='yxyx' .* xyxy, xywh, cxcywh"):
        box_math.to_xyxy(np.zeros((2, 4)), "yxyx")
    with pytest.raises(ValueError, match=r"shape \(4, 2\)"):
        box_math.flip(np.zeros((4, 2)))


def test_pixels_invert_and_height_is_height(boxes):
    assert same(box_math.normalise(box_math.denormalise(boxes, (480, 640)), (480, 640)), boxes)
    pixels = box_math.denormalise(np.array([0.5, 0.5, 1.0, 1.0]), (480, 640))
    assert pixels.tolist() == [320, 240, 640, 480]
    assert box_math.normalise(torch.tensor([320, 240, 640, 480]), (480, 640)).tolist() == [0.5, 0.5, 1.0, 1.0]
    assert box_math.normalise(np.array([320, 240, 640, 480]), (480, 640)).tolist() == [0.5, 0.5, 1.0, 1.0]


def test_flip_undoes_itself_and_keeps_area(boxes):
    assert same(box_math.flip(box_math.flip(boxes)), boxes)
    assert same(box_math.area(box_math.flip(boxes)), box_math.area(boxes))


def test_crop_inverts_through_the_opposite_window(boxes):
    left, top, right, bottom = window = (0.1, 0.2, 0.7, 0.5)
    width, height = right - left, bottom - top
    back = (-left / width, -top / height, (1 - left) / width, (1 - top) / height)
    assert same(box_math.crop(box_math.crop(boxes, window), back), boxes)
    assert np.allclose(box_math.crop(np.array(window), window), [0, 0, 1, 1])


def test_crop_refuses_a_window_without_area():
    with pytest.raises(ValueError, match="has no area"):
        box_math.crop(np.zeros((1, 4)), (0.5, 0, 0.5, 1))


def test_clip_keeps_what_is_inside():
    assert box_math.clip(np.array([-0.5, 0.25, 0.5, 1.5])).tolist() == [0, 0.25, 0.5, 1]
    assert box_math.area(box_math.clip(torch.tensor([1.5, 0.0, 2.0, 1.0]))).item() == 0


def test_iou_equals_counting_cells():
    rng = np.random.default_rng(1)
    cells = np.sort(rng.integers(0, 13, (30, 2, 2)), 1).reshape(-1, 4).astype(float)  # whole cells of 12 x 12
    ys, xs = np.mgrid[:12, :12] + 0.5
    inside = [(xs > x0) & (xs < x1) & (ys > y0) & (ys < y1) for x0, y0, x1, y1 in cells]
    found = box_math.iou(cells[:7], cells[7:])
    assert found.shape == (7, 23)
    for i in range(7):
        for j in range(23):
            union = (inside[i] | inside[7 + j]).sum()
            assert found[i, j] == pytest.approx((inside[i] & inside[7 + j]).sum() / union if union else 0.0)


def test_iou_is_symmetric_bounded_and_one_with_itself():
    a, b = random_boxes(6, seed=2), random_boxes(4, seed=3)
    assert np.allclose(box_math.iou(a, b), box_math.iou(b, a).T)
    assert ((box_math.iou(a, b) >= 0) & (box_math.iou(a, b) <= 1)).all()
    assert np.allclose(np.diag(box_math.iou(a, a)), 1)
    assert torch.allclose(box_math.iou(torch.from_numpy(a), torch.from_numpy(b)), torch.from_numpy(box_math.iou(a, b)))


def test_pairwise_iou_is_the_diagonal():
    a, b = random_boxes(6, seed=4), random_boxes(6, seed=5)
    assert np.allclose(box_math.pairwise_iou(a, b), np.diag(box_math.iou(a, b)))


def test_boxes_without_area_overlap_nothing():
    nothing = torch.zeros(2, 4)
    assert box_math.iou(nothing, nothing).tolist() == [[0, 0], [0, 0]]
    assert box_math.iou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
