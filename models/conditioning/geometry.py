"""Where boxes lie among the cells of a latent: coverage, and each cell's place in the boxes that touch it.

Pure tensor geometry that methods share; partitions of the plane and the published rasterisation live in `scenes.regions`.

Legend: B pictures, N boxes, h w cells, F frequencies.
"""

import math

import torch
from torch import Tensor


def fourier(values: Tensor, frequencies: int) -> Tensor:
    """Sines and cosines of `values` (..., D) at 100**(f / F): (..., 2 * F * D), one D after the other for each frequency.

    Source:
        GLIGEN (Li et al. 2023), Fourier embedding of boxes; 8 frequencies there and in the rich-context system.
    """
    scales = 100 ** (torch.arange(frequencies, device=values.device, dtype=values.dtype) / frequencies)
    angles = scales[:, None] * values[..., None, :]
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)


def overlap(boxes: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """The share of each cell that each box covers.

    Args:
        boxes: (B, N, 4) xyxy in [0, 1].
        valid: (B, N) bool; other boxes cover nothing.
        size: (h, w) cells.

    Returns:
        (B, N, h, w) in [0, 1].
    """
    height, width = size
    across = _covered(boxes[..., 0], boxes[..., 2], width)
    down = _covered(boxes[..., 1], boxes[..., 3], height)
    return down[..., :, None] * across[..., None, :] * valid[..., None, None]


def _covered(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """(…, cells) covered length of each cell, in cells, for intervals (…) in [0, 1]."""
    edge = torch.arange(cells, device=low.device, dtype=low.dtype)
    return (torch.minimum(high[..., None] * cells, edge + 1) - torch.maximum(low[..., None] * cells, edge)).clamp(0, 1)


def place_in_box(boxes: Tensor, size: tuple[int, int], frequencies: int) -> Tensor:
    """Each cell's place in each box: its distances to the four sides, near (in cells) and far (in boxes).

    Args:
        boxes: (B, N, 4) xyxy in [0, 1].
        size: (h, w) cells.
        frequencies: F frequencies for the near distances.

    Returns:
        (B, N, h, w, 4 + 8 * F): distances over the box's side, in [-1, 2] near the box, and Fourier features of the
        distances in cells, cut at 2 cells, so that an edge is placed inside its cell.
    """
    height, width = size
    across = (torch.arange(width, device=boxes.device, dtype=boxes.dtype) + 0.5)[None, None]
    down = (torch.arange(height, device=boxes.device, dtype=boxes.dtype) + 0.5)[None, None]
    sides = [  # (B, N, cells) signed distances in cells, positive inside the box
        (across - boxes[..., 0, None] * width, width, False),
        (boxes[..., 2, None] * width - across, width, False),
        (down - boxes[..., 1, None] * height, height, True),
        (boxes[..., 3, None] * height - down, height, True),
    ]
    extents = {False: (boxes[..., 2] - boxes[..., 0]) * width, True: (boxes[..., 3] - boxes[..., 1]) * height}
    shape = (*boxes.shape[:2], height, width)
    near, far = [], []
    for distance, _, vertical in sides:
        spread = distance[..., :, None] if vertical else distance[..., None, :]
        near.append((spread.clamp(-2, 2) / 2).expand(shape))
        share = distance / extents[vertical][..., None].clamp_min(1e-6)
        far.append((share[..., :, None] if vertical else share[..., None, :]).clamp(-1, 2).expand(shape))
    waves = (
        torch.stack(near, dim=-1)[..., None, :]
        * (math.pi / 2)
        * 2 ** torch.arange(frequencies, device=boxes.device)[:, None]
    )
    return torch.cat([torch.stack(far, dim=-1), waves.sin().flatten(-2), waves.cos().flatten(-2)], dim=-1)
