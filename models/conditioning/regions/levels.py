"""Where the regions of a batch lie: numbered over the batch, brought to each resolution, and sorted into blocks.

Partitions come from `scenes.regions`; what the regions say is put together in `tokens`. Everything here runs on the CPU,
once a picture.

Legend: B pictures, N objects, R regions of the batch, h w latent cells, L positions of a resolution, M blocks of S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.conditioning.regions.attention import RegionLevel
from models.conditioning.regions.tokens import RegionRows
from scenes import SceneBatch
from scenes.regions import Rasterise, cover, disjoint_regions

APART = -1e3  # the published bias between positions that are in no box together
MANY = 2048  # positions from which larger blocks pay (docs/decisions/0006)


@dataclass(frozen=True, kw_only=True)
class BatchRegions:
    """The regions of a batch, those of a picture one after the other, its background first.

    Attributes:
        index: (B, h, w) int64, the region of each cell; -1 where there is none.
        owner: the picture of each of the R regions.
        members: for each region, the objects of its picture that it lies in; none for a background.
        iou: for each region, as many overlaps in [0, 1], the largest of them 1.
        unions: (R + 1, h, w) bool, the cells of all the region's boxes; all cells for a background, and in the last row, which
            stands for positions in no region.
        left_out: regions beyond the limit; their cells are in none.
    """

    index: Tensor
    owner: list[int]
    members: list[list[int]]
    iou: list[list[float]]
    unions: Tensor
    left_out: int


def batch_regions(
    scenes: SceneBatch, size: tuple[int, int], *, rasterise: Rasterise, most: int | None, at_random: bool
) -> BatchRegions:
    """Partitions every picture of a batch.

    Args:
        scenes: B scenes; one without a box has no regions at all, which is the null condition.
        size: (h, w) latent cells.
        rasterise: how boxes become cells, see `scenes.regions.cover`.
        most: how many regions a picture may have; None for any number.
        at_random: which stay if there are more: any, drawn from torch's generator, or those of most cells.

    Returns:
        The regions.
    """
    height, width = size
    boxes, valid = scenes.host
    indices, owner, members, ious, unions, left_out = [], [], [], [], [], 0
    for picture in range(len(scenes)):
        if not valid[picture].any():
            indices.append(torch.full(size, -1))
            continue
        found = disjoint_regions(boxes[picture], valid[picture], height=height, width=width, rasterise=rasterise)
        cells = torch.bincount(found.index.flatten(), minlength=len(found))
        kept = _kept(cells, most, at_random=at_random)
        left_out += int((cells > 0).sum()) - len(kept)
        number = torch.full((len(found),), -1).index_put((kept,), torch.arange(len(kept)) + len(owner))
        indices.append(number[found.index])
        covered = cover(boxes[picture], valid[picture], height=height, width=width, rasterise=rasterise)
        union = torch.einsum("rn,nhw->rhw", found.members[kept].float(), covered.float()) > 0
        unions.append(union | ~found.members[kept].any(dim=1)[:, None, None])
        for row, shares in zip(found.members[kept].tolist(), found.iou[kept].tolist(), strict=True):
            inside = [place for place, member in enumerate(row) if member]
            owner.append(picture)
            members.append(inside)
            ious.append([shares[place] for place in inside])
    unions.append(torch.ones(1, height, width, dtype=torch.bool))
    return BatchRegions(
        index=torch.stack(indices), owner=owner, members=members, iou=ious, unions=torch.cat(unions), left_out=left_out
    )


def _kept(cells: Tensor, most: int | None, *, at_random: bool) -> Tensor:
    """The regions that stay, in order: those with cells, and no more than allowed."""
    present = cells.nonzero().flatten()
    if most is None or len(present) <= most:
        return present
    order = torch.randperm(len(present)) if at_random else cells[present].argsort(descending=True, stable=True)
    return present[order[:most]].sort().values


def region_level(
    regions: BatchRegions,
    rows: RegionRows,
    size: tuple[int, int],
    *,
    rasterise: Rasterise,
    within: bool,
    dtype: torch.dtype = torch.float32,
) -> RegionLevel:
    """Brings the regions to one resolution, on the device of the rows.

    Args:
        regions: of the batch.
        rows: the tokens of each region.
        size: (h', w') positions.
        rasterise: "published" takes the cell at the upper left corner of each position, "exact" the one at its centre.
        within: whether self-attention needs to know which positions lie together.
        dtype: of what says so, best that of the queries.

    Returns:
        What the attention reads there.
    """
    mode = "nearest" if rasterise == "published" else "nearest-exact"

    def resized(maps: Tensor) -> Tensor:
        return functional.interpolate(maps[None].float(), size, mode=mode)[0].flatten(1)

    device = rows.tokens.device
    index = resized(regions.index).long()
    query, region, place = blocks(index.flatten(), len(rows.tokens), size=64 if index.shape[1] > MANY else 32)
    covered = (index >= 0).to(device)
    together = None
    if within:
        bias = torch.where(resized(regions.unions) > 0, 0.0, APART).to(device, dtype)
        together = bias[index.to(device)][:, None]  # -1 takes the last row
    return RegionLevel(
        query=query.to(device),
        place=place.to(device),
        tokens=rows.tokens[region.to(device)],
        bias=rows.bias[region.to(device)][:, None, None],
        covered=covered[..., None],
        together=together,
    )


def blocks(index: Tensor, count: int, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts positions into blocks of one region each.

    Args:
        index: (P,) int64, the region of each position; -1 for none.
        count: R.
        size: S.

    Returns:
        Positions (M, S) of each block, filled up with position 0; the region (M,) of each block; the place (P,) of each
        position among the M * S, 0 for one in no region. M is at least 1.
    """
    held = (index >= 0).nonzero().flatten()
    order = held[index[held].argsort(stable=True)]
    counts = torch.bincount(index[held], minlength=count)
    number = -(-counts // size)
    region = index[order]
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[region]
    slot = (number.cumsum(0) - number)[region] * size + rank
    query = torch.zeros(max(int(number.sum()), 1) * size, dtype=torch.int64)
    query[slot] = order
    place = torch.zeros(len(index), dtype=torch.int64)
    place[order] = slot
    owner = torch.repeat_interleave(torch.arange(count), number)
    return query.view(-1, size), owner if len(owner) else torch.zeros(1, dtype=torch.int64), place
