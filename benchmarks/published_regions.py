"""The regional attention as its authors compute it, written anew: every position once for each of N regions.

The other side of `benchmarks.regions`, and what the tests hold the fast path against. Nothing here is shared with it but the
weights and the partition of the plane.

Legend: B pictures, N slots for regions, T tokens of the text encoder's full length, L positions, C width, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.conditioning.regions.attention import RegionalAttention
from models.conditioning.regions.tokens import RegionTokens
from models.text import TextTowers
from scenes import Scene, SceneBatch
from scenes.regions import Rasterise, cover, disjoint_regions

CLOSED = -1e3


@dataclass(frozen=True, kw_only=True)
class PublishedInputs:
    """What the published layer takes, padded to N slots.

    Attributes:
        features: (B, N, T, text width) words as the encoder pads them, 0 in empty slots.
        boxes: (B, N, T, 4) the box of each word's object, -1 for other tokens.
        bias: (B, N, T) added to the logits.
        masks: (B, N, h, w) 1 on the region's cells.
        unions: (B, N, h, w) 1 on the cells of its boxes.
    """

    features: Tensor
    boxes: Tensor
    bias: Tensor
    masks: Tensor
    unions: Tensor

    def at(self, size: tuple[int, int], mode: str) -> tuple[Tensor, Tensor]:
        """Masks and unions (B, N, L) at a resolution."""
        masks, unions = (functional.interpolate(m, size, mode=mode).flatten(2) for m in (self.masks, self.unions))
        return masks, unions


def published_inputs(
    scenes: SceneBatch, text: TextTowers, size: tuple[int, int], *, slots: int, rasterise: Rasterise
) -> PublishedInputs:
    """Region after region, as published; `slots` must be enough for every picture."""
    rows = [_picture(scene, text, size, slots, rasterise) for scene in scenes.scenes]
    return PublishedInputs(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def _picture(
    scene: Scene, text: TextTowers, size: tuple[int, int], slots: int, rasterise: Rasterise
) -> dict[str, Tensor]:
    length = text.max_length
    row = {
        "features": torch.zeros(slots, length, text.width),
        "boxes": torch.full((slots, length, 4), -1.0),
        "bias": torch.zeros(slots, length),
        "masks": torch.zeros(slots, *size),
        "unions": torch.zeros(slots, *size),
    }
    if not scene.objects:
        return row
    boxes, valid = torch.tensor([item.box for item in scene.objects]), torch.ones(len(scene.objects), dtype=torch.bool)
    found = disjoint_regions(boxes, valid, height=size[0], width=size[1], rasterise=rasterise)
    under = cover(boxes, valid, height=size[0], width=size[1], rasterise=rasterise)
    tower = text.each[0]
    separator = tower.tokenise([";"])[0][1]
    present = [region for region in range(len(found)) if found.index.eq(region).any()]
    members = [found.members[region].nonzero().flatten().tolist() for region in present]
    texts = [(item.description or item.phrase).replace(";", "") for item in scene.objects]
    labels = ["; ".join(texts[n] for n in inside) for inside in members]
    row["features"][: len(labels)] = text.encode_phrases(labels, masked=True).last_hidden
    for slot, (region, inside, ids) in enumerate(zip(present, members, tower.tokenise(labels), strict=True)):
        ids = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
        row["bias"][slot] = CLOSED
        start, spans = 1, []
        for place, one in enumerate(ids):
            if one == separator or place == len(ids) - 1:
                spans.append((start, place))
                start = place + 1
        for n, (start, end) in zip(inside, spans, strict=False):
            row["boxes"][slot, start:end] = boxes[n]
            row["bias"][slot, start:end] = float(found.iou[region, n]) - 1
        row["masks"][slot] = found.index.eq(region).float()
        row["unions"][slot] = under[inside].any(0).float() if inside else torch.ones(size)
    return row


def published_tokens(network: RegionTokens, inputs: PublishedInputs) -> Tensor:
    """(B, N, T, D): every slot's tokens, empty ones included."""
    return network(inputs.features, inputs.boxes)


def published_attention(
    layer: RegionalAttention, hidden: Tensor, tokens: Tensor, bias: Tensor, masks: Tensor, unions: Tensor
) -> Tensor:
    """(B, L, C) what the published layer gives for hidden states (B, L, C).

    Args:
        layer: whose weights are taken.
        hidden: (B, L, C).
        tokens: (B, N, T, D).
        bias: (B, N, T).
        masks: (B, N, L).
        unions: (B, N, L), read by the variant with self-attention.
    """
    slots = masks.shape[1]

    def repeated(states: Tensor) -> Tensor:
        return states[:, None].expand(-1, slots, -1, -1).flatten(0, 1)

    regions = masks[..., None]
    each = _attend(layer.attn, layer.heads, repeated(hidden), tokens.flatten(0, 1), bias.flatten(0, 1))
    summed = (each.unflatten(0, (-1, slots)) * regions).sum(dim=1)
    hidden = hidden + summed + (1 - regions.sum(dim=1)) * layer.null_text_feat
    if layer.self_attn is None:
        return hidden
    states = repeated(hidden)
    each = _attend(layer.self_attn, layer.heads, states, states, ((1 - unions) * CLOSED).flatten(0, 1))
    return hidden + (each.unflatten(0, (-1, slots)) * regions).sum(dim=1)


def _attend(layers: Any, heads: int, hidden: Tensor, context: Tensor, bias: Tensor) -> Tensor:
    query, key, value = (
        layers[name](states).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name, states in (("to_q", hidden), ("to_k", context), ("to_v", context))
    )
    found = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None, None])
    return layers["to_out"][0](found.transpose(1, 2).flatten(2))


def slots_needed(scenes: Sequence[Scene], size: tuple[int, int], *, rasterise: Rasterise) -> int:
    """The most regions that any of the scenes has, its background included."""
    most = 1
    for scene in scenes:
        if scene.objects:
            boxes = torch.tensor([item.box for item in scene.objects])
            valid = torch.ones(len(boxes), dtype=torch.bool)
            most = max(most, len(disjoint_regions(boxes, valid, height=size[0], width=size[1], rasterise=rasterise)))
    return most
