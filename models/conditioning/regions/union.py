"""Attention over the union of a position's boxes, with a map of places in boxes: a form of our own, for small pictures.

The words of every box that covers a position are its keys and values, without a partition into regions; positions under no
box get a learnt null feature, and what is added may depend on the hidden state and on where in its boxes a position lies
(docs/decisions/0005). The published function lives in `attention`. Geometry lives in `models.conditioning.geometry`.

Legend: B pictures, N objects, T tokens of the longest text, K = N * T packed tokens, L = h * w positions, C width of a block,
D width of a region token, G width of the place map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.conditioning.base import Text
from models.conditioning.geometry import overlap, place_in_box
from models.conditioning.slots import BlockSite
from scenes.regions import cover

if TYPE_CHECKING:
    from scenes import SceneBatch


@dataclass(frozen=True, kw_only=True)
class UnionLevel:
    """Where the region tokens apply at one resolution.

    Attributes:
        mask: (B, L, K) bool, True where a position may attend to a token; a position under no box opens all of them
            (its result is replaced), so that no row of the attention is empty.
        covered: (B, L, 1) bool, True under at least one box.
        places: (B, L, G) what the boxes say about each position; None where the adapter has no place map.
    """

    mask: Tensor
    covered: Tensor
    places: Tensor | None


@dataclass(frozen=True, kw_only=True)
class UnionPayload:
    """What every block reads: tokens (B, K, D) once, and by number of positions where they apply."""

    tokens: Tensor
    levels: dict[int, UnionLevel]


class UnionAttention(nn.Module):
    """Residual cross-attention to the words of a position's boxes in one slot; adds nothing at initialisation.

    Args:
        site: the block.
        token_width: D.
        place_width: G, 0 without a place map.
    """

    def __init__(self, site: BlockSite, *, token_width: int, place_width: int) -> None:
        super().__init__()
        inner = site.heads * site.head_width
        self.heads = site.heads
        self.norm = nn.LayerNorm(site.width)
        self.to_q = nn.Linear(site.width, inner, bias=False)
        self.to_k = nn.Linear(token_width, inner, bias=False)
        self.to_v = nn.Linear(token_width, inner, bias=False)
        self.null = nn.Parameter(torch.zeros(inner))
        self.mix = nn.Linear(site.width + inner + place_width, 2 * inner) if place_width else None
        self.to_out = nn.Linear(2 * inner if place_width else inner, site.width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, hidden: Tensor, payload: UnionPayload) -> Tensor:
        """Hidden states (B, L, C) with the words of each position's boxes added."""
        level = payload.levels[hidden.shape[1]]
        normed = self.norm(hidden)
        query = self._split(self.to_q(normed))
        key, value = self._split(self.to_k(payload.tokens)), self._split(self.to_v(payload.tokens))
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=level.mask[:, None])
        found = torch.where(level.covered, found.transpose(1, 2).flatten(2), self.null.to(found.dtype))
        if self.mix is not None:  # what to add depends on what is there: an object in the wrong place must go
            found = functional.silu(self.mix(torch.cat([normed, found, cast(Tensor, level.places)], dim=-1)))
        return hidden + self.to_out(found)

    @property
    def gate(self) -> Tensor:
        """What is zero until the attention acts."""
        return self.to_out.weight

    def _split(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PlaceMap(nn.Module):
    """What the boxes say about each position: a sum over those that touch it, weighted by how much of it they cover.

    Beyond the published method, whose positions know a box only through its words' tokens.

    Args:
        token_width: D.
        width: G.
        hidden: width between the layers.
        frequencies: frequencies of the distances to the box's sides.
    """

    def __init__(self, *, token_width: int, width: int, hidden: int, frequencies: int = 3) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.where = nn.Linear(4 + 8 * frequencies, hidden)
        self.what = nn.Linear(token_width, hidden)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor, boxes: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, L, G) of one token per object (B, N, D), boxes (B, N, 4) and valid (B, N)."""
        place = self.where(place_in_box(boxes, size, self.frequencies).to(tokens.dtype))
        features = functional.silu(place + self.what(tokens)[:, :, None, None])
        share = overlap(boxes, valid, size).to(features.dtype)
        return self.out((features * share[..., None]).sum(dim=1).flatten(1, 2))


def union_payload(
    scenes: SceneBatch,
    texts: Sequence[Sequence[str]],
    text: Text,
    sizes: Sequence[tuple[int, int]],
    *,
    tokens_of: nn.Module,
    places_of: PlaceMap | None,
) -> UnionPayload:
    """Tokens of all objects and where they apply; an empty batch of objects is B null conditions.

    Args:
        scenes: B scenes.
        texts: one of each object.
        text: encodes them.
        sizes: (h, w) of each resolution.
        tokens_of: words and boxes to tokens.
        places_of: the place map, if there is one.

    Returns:
        What every block reads.
    """
    boxes, valid = _at_least_one(scenes)
    words, open_words, ends = _phrase_tokens(texts, valid, text)
    tokens = tokens_of(words, boxes[:, :, None].expand(*words.shape[:3], -1))
    whole = tokens.gather(2, ends[..., None, None].expand(-1, -1, 1, tokens.shape[-1])).squeeze(2)
    levels = {}
    for size in sizes:
        under = cover(boxes, valid, height=size[0], width=size[1]).flatten(2).transpose(1, 2)
        mask = (under[..., None] & open_words[:, None]).flatten(2)
        covered = mask.any(dim=-1, keepdim=True)
        places = None if places_of is None else places_of(whole, boxes, valid, size)
        levels[size[0] * size[1]] = UnionLevel(mask=mask | ~covered, covered=covered, places=places)
    return UnionPayload(tokens=tokens.flatten(1, 2), levels=levels)


def _at_least_one(scenes: SceneBatch) -> tuple[Tensor, Tensor]:
    """Boxes (B, N, 4) and valid (B, N), with one absent object where no scene has any, so that no axis is empty."""
    if scenes.boxes.shape[1]:
        return scenes.boxes, scenes.valid
    return scenes.boxes.new_zeros(len(scenes), 1, 4), scenes.valid.new_zeros(len(scenes), 1)


def _phrase_tokens(texts: Sequence[Sequence[str]], valid: Tensor, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """Words (B, N, T, C) of every object, which of them count (B, N, T), and where each text ends (B, N).

    Objects that are not valid have no word that counts. The last word of a text has seen all of it.
    """
    shape = tuple(valid.shape)
    features = text.phrases([one for row in texts for one in [*row, *[""] * (shape[1] - len(row))]])
    words = features.last_hidden.unflatten(0, shape)
    open_words = features.mask.unflatten(0, shape) & valid[..., None]
    return words, open_words, (features.lengths - 1).unflatten(0, shape)
