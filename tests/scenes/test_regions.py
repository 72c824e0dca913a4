"""Covered cells and disjoint regions: they tile the grid, equal a loop, and equal the published partition."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scenes.boxes import normalise
from scenes.regions import cover, disjoint_regions

SIZES = [(1, 1), (3, 5), (17, 8), (32, 48)]


def random_boxes(count: int, seed: int) -> torch.Tensor:
    corners = np.random.default_rng(seed).uniform(size=(count, 2, 2))
    corners[::3, 1] = corners[::3, 0] + 1e-3 * corners[::3, 1]  # every third is tiny
    corners[1::4] = corners[1::4].round(1)  # every fourth has edges on a lattice
    return torch.tensor(np.concatenate([corners.min(1), corners.max(1)], -1)).clip(0, 1).float()


def covered_by_loop(box, height: int, width: int) -> np.ndarray:
    """The rule as it is told: cells whose centre is in the box, else the one of its own centre."""
    x0, y0, x1, y1 = (float(v) for v in box)

    def along(low, high, cells):
        inside = [low * cells - 1e-4 <= i + 0.5 < high * cells - 1e-4 for i in range(cells)]
        if not any(inside):
            inside[min(int((low + high) / 2 * cells), cells - 1)] = True
        return inside

    rows, columns = along(y0, y1, height), along(x0, x1, width)
    return np.array([[r and c for c in columns] for r in rows])


def regions_by_loop(masks: np.ndarray):
    """Cell by cell: a region for each distinct set of boxes, the sets in the order of binary numbers."""
    count, height, width = masks.shape
    sets = {tuple(masks[:, y, x]) for y in range(height) for x in range(width)} | {(False,) * count}
    order = sorted(sets)
    index = [[order.index(tuple(masks[:, y, x])) for x in range(width)] for y in range(height)]
    ious = []
    for place, members in enumerate(order):
        region = np.array(index) == place
        pairs = zip(masks, members, strict=True)
        raw = [(region & mask).sum() / (region | mask).sum() if inside else 0 for mask, inside in pairs]
        ious.append([v / max(raw) if max(raw) else 0.0 for v in raw])
    return np.array(index), np.array(order).reshape(len(order), count), np.array(ious)


@pytest.mark.parametrize("size", SIZES)
def test_cover_equals_the_loop(size):
    boxes = random_boxes(30, seed=sum(size))
    found = cover(boxes, torch.ones(30, dtype=torch.bool), height=size[0], width=size[1])
    assert found.shape == (30, *size)
    for box, cells in zip(boxes, found, strict=True):
        assert np.array_equal(cells.numpy(), covered_by_loop(box, *size))


def test_every_box_keeps_a_cell_and_the_whole_covers_all():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.999999, 0.999999, 1.0, 1.0], [0.5, 0.0, 0.500001, 1.0]])
    found = cover(boxes, torch.ones(3, dtype=torch.bool), height=6, width=9)
    assert found[0].all()
    assert found[1, -1, -1]
    assert found[1].sum() == 1
    assert found[2, :, 4].all()
    assert found[2].sum() == 6


def test_boxes_that_tile_the_picture_tile_the_cells():
    edges = torch.tensor([0.0, 0.21, 0.5, 0.77, 1.0])
    boxes = torch.stack([torch.stack([a, b, c, d]) for a, c in pairwise(edges)
                         for b, d in pairwise(edges)])  # fmt: skip
    for height, width in ((8, 12), (7, 31)):
        found = cover(boxes, torch.ones(16, dtype=torch.bool), height=height, width=width)
        assert torch.equal(found.sum(0), torch.ones(height, width, dtype=torch.long))


def test_cover_is_the_same_in_a_batch_and_leaves_out_what_is_not_valid():
    boxes = torch.stack([random_boxes(6, 1), random_boxes(6, 2)])
    valid = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    found = cover(boxes, valid, height=5, width=7)
    assert found.shape == (2, 6, 5, 7)
    for b in range(2):
        assert torch.equal(found[b], cover(boxes[b], valid[b], height=5, width=7))
    assert not found[~valid].any()
    assert found[valid].flatten(1).any(1).all()


@pytest.mark.parametrize("rasterise", ["exact", "published"])
@pytest.mark.parametrize(("count", "size"), [(0, (3, 5)), (1, (1, 1)), (5, (17, 8)), (33, (9, 12)), (40, (32, 48))])
def test_regions_equal_the_loop(count, size, rasterise):
    boxes, valid = random_boxes(count, seed=count), torch.ones(count, dtype=torch.bool)
    valid[2:4] = False
    masks = cover(boxes, valid, height=size[0], width=size[1], rasterise=rasterise).numpy()
    index, members, ious = regions_by_loop(masks)
    found = disjoint_regions(boxes, valid, height=size[0], width=size[1], rasterise=rasterise)
    assert len(found) == len(members)
    assert np.array_equal(found.index.numpy(), index)
    assert np.array_equal(found.members.numpy(), members)
    assert found.iou.dtype == torch.float32
    assert np.allclose(found.iou.numpy(), ious, atol=1e-6)


def test_regions_tile_the_plane():
    boxes = random_boxes(70, seed=9)  # more boxes than bits of a number
    valid = torch.ones(70, dtype=torch.bool)
    found = disjoint_regions(boxes, valid, height=21, width=34)
    masks = cover(boxes, valid, height=21, width=34)
    assert torch.equal(found.members[found.index].permute(2, 0, 1), masks)  # each cell is in the boxes it is in
    assert len(torch.unique(found.members, dim=0)) == len(found)
    assert set(found.index.unique().tolist()) >= set(range(1, len(found)))
    assert torch.allclose(found.iou[1:].amax(1), torch.ones(len(found) - 1))


def test_the_background_stays_when_no_cell_is_left_to_it():
    found = disjoint_regions(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([True]), height=2, width=3)
    assert found.members.tolist() == [[False], [True]]
    assert found.index.eq(1).all()
    assert found.iou.tolist() == [[0.0], [1.0]]


def test_the_order_of_boxes_only_renames_regions():
    boxes, valid = random_boxes(12, seed=5), torch.ones(12, dtype=torch.bool)
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    one = disjoint_regions(boxes, valid, height=13, width=19)
    other = disjoint_regions(boxes[turned], valid, height=13, width=19)
    assert torch.equal(one.members[one.index][..., turned], other.members[other.index])
    assert torch.allclose(one.iou[one.index][..., turned], other.iou[other.index])


def test_the_published_way_loses_the_last_row_and_thin_boxes():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.51, 0.9]])
    found = cover(boxes, torch.ones(2, dtype=torch.bool), height=4, width=6, rasterise="published")
    assert found[0, :-1, :-1].all()
    assert not found[0, -1].any()
    assert not found[0, :, -1].any()
    assert not found[1].any()


def test_bad_grids_are_refused():
    with pytest.raises(ValueError, match="height=0, width=4"):
        cover(torch.zeros(1, 4), torch.ones(1, dtype=torch.bool), height=0, width=4)
    with pytest.raises(ValueError, match=r"rasterise='rough'.*'exact' or 'published'"):
        cover(torch.zeros(1, 4), torch.ones(1, dtype=torch.bool), height=3, width=4, rasterise="rough")


@pytest.mark.parametrize("place", range(5))
def test_the_published_partition(place, golden):
    case = json.loads((golden / "rca" / "cases.json").read_text())[place]
    tensors = load_file(golden / "rca" / case["file"])
    size = case["height"], case["width"]
    boxes = normalise(tensors["layout.boxes_xyxy_px"].float(), size)
    valid = torch.ones(len(boxes), dtype=torch.bool)
    found = disjoint_regions(boxes, valid, height=size[0] // 8, width=size[1] // 8, rasterise="published")
    labels = ["; ".join(w for w, m in zip(case["labels"], row, strict=True) if m) for row in found.members]
    assert labels == case["region_labels"]
    recorded = tensors["in.reorg_masks"][0].bool()
    assert torch.equal(torch.nn.functional.one_hot(found.index).permute(2, 0, 1).bool(), recorded[: len(found)])
    # The published background has one box of -1 and one IoU of 1; here it has no members.
    for row in range(1, len(found)):
        inside = found.members[row]
        assert torch.allclose(found.iou[row, inside], torch.tensor(case["region_ious"][row]), atol=1e-5)
        assert not found.iou[row, ~inside].any()
        assert torch.allclose(boxes[inside], torch.tensor(case["region_boxes_normalised"][row]), atol=1e-5)
