"""From boxes to cells: which cells of a grid a box covers, and the disjoint regions that boxes make.

A region is a largest set of cells that lie in exactly the same boxes. The regions and the background tile
the grid, so each cell can attend to the text of its own region alone. Nothing here knows texts or attention.
Nothing loops over cells or regions.

Legend: B scenes, N boxes, R regions with the background, h x w cells.

Source: the regional cross-attention of "Rethinking The Training And Evaluation of Rich-Context
Layout-to-Image Generation" (arXiv 2409.04847).
"""

from dataclasses import dataclass
from typing import Literal

import torch

Rasterise = Literal["exact", "published"]
_CHUNK = 32  # boxes whose bits fit, with a rank, into one int64
_ROUNDING = 1e-4  # cells; float32 boxes of pixel origin must truncate as the pixels would


@dataclass(frozen=True)
class Regions:
    """A partition of h x w cells.

    Attributes:
        index: (h, w) int64, the region of each cell; 0 is the background.
        members: (R, N) bool, the boxes that a region lies in. Row 0, the background, is False throughout;
            the others follow in the order of their rows read as binary numbers, box 0 the highest digit.
        iou: (R, N) float32 in [0, 1], overlap of a region with each of its boxes (as rasterised) divided by
            the largest of the region; 0 where the box is no member, so row 0 is 0.
    """

    index: torch.Tensor
    members: torch.Tensor
    iou: torch.Tensor

    def __len__(self) -> int:
        """How many regions there are, the background included even where no cell is left to it (R)."""
        return self.members.shape[0]


def cover(
    boxes: torch.Tensor, valid: torch.Tensor, *, height: int, width: int, rasterise: Rasterise = "exact"
) -> torch.Tensor:
    """The cells that each box covers.

    Args:
        boxes: (B, N, 4) or (N, 4), xyxy in [0, 1].
        valid: (B, N) or (N,) bool; what is not valid covers nothing.
        height: Rows of the grid (h).
        width: Columns of the grid (w).
        rasterise: ``exact`` gives a box the cells whose centres lie in it, left and top border included, and
            at least the one under its own centre. ``published`` repeats the published code: corners cut to
            whole cells, thin boxes lost, the last row and column never covered.

    Returns:
        (B, N, h, w) or (N, h, w) bool.

    Raises:
        ValueError: The grid has no cells, or ``rasterise`` is unknown.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width} is a grid without cells; give at least 1 each")
    columns = _span(boxes[..., 0], boxes[..., 2], width, rasterise)  # (…, N, w)
    rows = _span(boxes[..., 1], boxes[..., 3], height, rasterise)  # (…, N, h)
    return rows[..., :, None] & columns[..., None, :] & valid[..., None, None]


def disjoint_regions(
    boxes: torch.Tensor, valid: torch.Tensor, *, height: int, width: int, rasterise: Rasterise = "exact"
) -> Regions:
    """Partition a grid into the regions that lie in the same boxes.

    Args:
        boxes: (N, 4), xyxy in [0, 1].
        valid: (N,) bool; what is not valid is no member of any region.
        height: Rows of the grid (h); the published canvas has one per 8 pixels.
        width: Columns of the grid (w).
        rasterise: How boxes become cells, see :func:`cover`.

    Returns:
        The partition.

    Raises:
        ValueError: See :func:`cover`.
    """
    covered = cover(boxes, valid, height=height, width=width, rasterise=rasterise).flatten(1)  # (N, h·w)
    index, count = _ranked(covered)
    sample = torch.zeros(count, dtype=torch.int64, device=index.device)
    # Any cell of a region will do: all are members of the same boxes.
    sample[index] = torch.arange(index.numel(), device=index.device)
    members = covered[:, sample].T
    if members[0].any():  # every cell is covered: the background is there all the same, without cells
        index, members = index + 1, torch.cat([members.new_zeros(1, members.shape[1]), members])
    cells = torch.bincount(index, minlength=len(members))
    # A region lies inside its boxes, so their overlap is the region's share of the box.
    iou = members * cells[:, None] / covered.sum(1).clamp(min=1)
    iou = iou / iou.amax(1, keepdim=True).clamp(min=torch.finfo(iou.dtype).tiny) if iou.numel() else iou
    return Regions(index.view(height, width), members, iou.float())


def _span(low: torch.Tensor, high: torch.Tensor, cells: int, rasterise: Rasterise) -> torch.Tensor:
    """Which of ``cells`` equal intervals the span from ``low`` to ``high`` (…) covers: (…, cells) bool."""
    low, high = low.float() * cells, high.float() * cells
    if rasterise == "exact":
        first = (low - 0.5 - _ROUNDING).ceil()
        last = (high - 0.5 - _ROUNDING).ceil()
        middle = ((low + high) / 2).floor().clamp(0, cells - 1)
        thin = first >= last
        first, last = torch.where(thin, middle, first), torch.where(thin, middle + 1, last)
    elif rasterise == "published":
        first = (low + _ROUNDING).trunc().clamp(0, cells - 1)
        last = (high + _ROUNDING).trunc().clamp(0, cells - 1)
    else:
        raise ValueError(f"rasterise={rasterise!r} is not known; use 'exact' or 'published'")
    cell = torch.arange(cells, device=low.device)
    return (cell >= first[..., None]) & (cell < last[..., None])


def _ranked(covered: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Ranks (L,) without gaps of the columns of (N, L) bool, read as numbers, and how many there are."""
    rank = torch.zeros(covered.shape[1], dtype=torch.int64, device=covered.device)
    count = 1
    for chunk in covered.split(_CHUNK):  # a rank fits 31 bits, so the sum below fits an int64
        digits = torch.arange(len(chunk) - 1, -1, -1, device=covered.device)
        number = (chunk.long() << digits[:, None]).sum(0)
        unique, rank = torch.unique((rank << _CHUNK) | number, return_inverse=True)
        count = len(unique)
    return rank, count
