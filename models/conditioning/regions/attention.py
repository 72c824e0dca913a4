"""Regional cross-attention as published, and its variant with self-attention, each computed once.

The published layer repeats every position once for each region, attends in each, and keeps one answer a position. Here a
position is projected once, a token's key and value are projected once, and positions are sorted into blocks of one region
each, so that a single batched attention answers every position from its own region's tokens. Which tokens those are is
worked out in `tokens`, where regions lie in `levels`.

Legend: B pictures, L positions of a block of the UNet, C its width, K tokens of all regions of the batch, D their width,
M blocks of S positions, T tokens of the longest region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.conditioning.slots import BlockSite


@dataclass(frozen=True, kw_only=True)
class RegionLevel:
    """Where the regions lie at one resolution.

    Attributes:
        query: (M, S) int64, positions b * L + l of the batch, those of a block in one region; the end of a region's last block
            is filled with position 0.
        place: (B * L,) int64, where among the M * S each position stands; 0 for one in no region.
        tokens: (M, T) int64, the tokens of each block's region among the K.
        bias: (M, 1, 1, T) added to the logits; -inf closes a token.
        covered: (B, L, 1) bool, False for a position in no region.
        together: (B, 1, L, L) bias of the self-attention of `casa`: 0 for positions in the boxes of one's region, else -1000 as
            published, which is not the same as nothing where hidden states are large; None for `ca`.
    """

    query: Tensor
    place: Tensor
    tokens: Tensor
    bias: Tensor
    covered: Tensor
    together: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RegionPayload:
    """What every block of the UNet reads.

    Attributes:
        tokens: (K, D) every distinct token of the batch once.
        levels: by number of positions L.
        kept: keys and values (K, C) of each attention in order; empty where they are to be projected at every call, as in
            training.
    """

    tokens: Tensor
    levels: dict[int, RegionLevel]
    kept: tuple[tuple[Tensor, Tensor], ...] = ()


class RegionalAttention(nn.Module):
    """What a position's own region says is added to it; adds nothing at initialisation. Keys as published.

    Args:
        site: the block of the UNet.
        token_width: D.
        place: which of the adapter's attentions this is, counted from 0.
        within: whether positions then attend to the positions of their region's boxes (`casa`).

    Source:
        Rich-context layout-to-image (Cheng et al., NeurIPS 2024), section 3: regional cross-attention.
    """

    def __init__(self, site: BlockSite, *, token_width: int, place: int, within: bool) -> None:
        super().__init__()
        self.heads, self.place = site.heads, place
        self.attn = _projections(site, token_width)
        self.null_text_feat = nn.Parameter(torch.zeros(site.width))
        self.self_attn = _projections(site, site.width) if within else None

    def forward(self, hidden: Tensor, payload: RegionPayload) -> Tensor:
        """Hidden states (B, L, C) with what their regions say."""
        level = payload.levels[hidden.shape[1]]
        key, value = payload.kept[self.place] if payload.kept else self.project(payload.tokens.to(hidden.dtype))
        found = self._across(hidden, key, value, level)
        hidden = hidden + torch.where(level.covered, found, self.null_text_feat.to(found.dtype))
        if self.self_attn is None:
            return hidden
        found = self._within(hidden, self.self_attn, cast(Tensor, level.together))
        return hidden + found * level.covered

    @property
    def gate(self) -> Tensor:
        """What is zero until the attention acts."""
        return cast(Tensor, _out(self.attn).weight)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (K, C) of tokens (K, D)."""
        return self.attn["to_k"](tokens), self.attn["to_v"](tokens)

    def _across(self, hidden: Tensor, key: Tensor, value: Tensor, level: RegionLevel) -> Tensor:
        """(B, L, C) answers of the positions' own regions; meaningless for positions in none."""
        query = self.attn["to_q"](hidden).flatten(0, 1)
        chosen = level.tokens.flatten()
        found = functional.scaled_dot_product_attention(
            self._split(query.index_select(0, level.query.flatten()).unflatten(0, level.query.shape)),
            self._split(key.index_select(0, chosen).unflatten(0, level.tokens.shape)),
            self._split(value.index_select(0, chosen).unflatten(0, level.tokens.shape)),
            attn_mask=level.bias.to(query.dtype),
        )
        found = found.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, level.place)
        return _out(self.attn)(found.unflatten(0, hidden.shape[:2]))

    def _within(self, hidden: Tensor, attention: nn.ModuleDict, together: Tensor) -> Tensor:
        """(B, L, C) answers of the positions that lie in a box with each."""
        query, key, value = (self._split(attention[name](hidden)) for name in ("to_q", "to_k", "to_v"))
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=together.to(query.dtype))
        return _out(attention)(found.transpose(1, 2).flatten(2))

    def _split(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _projections(site: BlockSite, token_width: int) -> nn.ModuleDict:
    """The layers of an attention under diffusers' names; the last gives zeros at first."""
    inner = site.heads * site.head_width
    out = nn.Linear(inner, site.width)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return nn.ModuleDict(
        {
            "to_q": nn.Linear(site.width, inner, bias=False),
            "to_k": nn.Linear(token_width, inner, bias=False),
            "to_v": nn.Linear(token_width, inner, bias=False),
            "to_out": nn.ModuleList([out]),
        }
    )


def _out(attention: nn.ModuleDict) -> nn.Module:
    return cast(nn.ModuleList, attention["to_out"])[0]
