"""The regions method: token network, regional cross-attention in every block's slot, and a map of places in boxes.

An object's words, each joined with the object's box, are the keys and values of the image positions that its box covers;
positions under no box get a learnt null feature. One masked attention over the packed tokens of a picture computes it.
Geometry lives in `models.conditioning.geometry`; partitions into disjoint regions in `scenes.regions`.

Legend: B pictures, N objects, T tokens of the longest phrase, K = N * T packed tokens, L = h * w positions, C width of a block,
D width of a region token, G width of the place map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.conditioning.adapter_file import load_weights
from models.conditioning.base import Adapter, AdapterOutput, Text, gate_figures
from models.conditioning.geometry import fourier, overlap, place_in_box
from models.conditioning.slots import BlockSite, block_sites
from scenes.regions import cover

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from scenes import SceneBatch


@dataclass(frozen=True, kw_only=True)
class RegionLevel:
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
class RegionPayload:
    """What every block reads: tokens (B, K, D) once, and by number of positions where they apply."""

    tokens: Tensor
    levels: dict[int, RegionLevel]


class RegionTokens(nn.Module):
    """Text and box to region token: every word of an object is told where the object is.

    Args:
        text_width: width of a phrase token.
        width: D.
        hidden: width between the layers.
        frequencies: Fourier frequencies of the box.

    Source:
        Sequenced Grounding Encoding, Rich-context layout-to-image (Cheng et al., NeurIPS 2024), section 3; GLIGEN eq. 6.
    """

    def __init__(self, *, text_width: int, width: int, hidden: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linears = nn.Sequential(
            nn.Linear(text_width + 8 * frequencies, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width),
        )

    def forward(self, text: Tensor, boxes: Tensor) -> Tensor:
        """Region tokens (B, N, T, D) of words (B, N, T, text width) and boxes (B, N, 4)."""
        where = fourier(boxes, self.frequencies)[:, :, None].expand(*text.shape[:3], -1)
        return self.linears(torch.cat([text, where.to(text.dtype)], dim=-1))


class RegionalAttention(nn.Module):
    """Residual cross-attention in one slot; adds nothing at initialisation.

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

    def forward(self, hidden: Tensor, payload: RegionPayload) -> Tensor:
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

    def _split(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class RegionsAdapter(Adapter):
    """Regional cross-attention over the words of boxes.

    Args:
        backbone: the denoiser to fit; read for its block sites and text width, not kept.
        width: D, width of a region token.
        hidden: width inside the token network.
        frequencies: Fourier frequencies of a box.
        place_width: G, width of the place map: what each position knows about its place in the boxes that touch it, so
            that edges fall between cells. 0 leaves the map out, as published.
        blocks: "all", or some of down, mid, up.
        weights: adapter file to start from; None starts at random.

    Raises:
        ValueError: weights that do not fit.
    """

    method = "regions"
    requires = frozenset({"boxes", "phrases"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        width: int = 128,
        hidden: int = 256,
        frequencies: int = 8,
        place_width: int = 0,
        blocks: str | Sequence[str] = "all",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        sites = block_sites(backbone.unet, blocks)
        self._settings = {
            "width": width,
            "hidden": hidden,
            "frequencies": frequencies,
            "place_width": place_width,
            "blocks": blocks if isinstance(blocks, str) else list(blocks),
        }
        self.levels = sorted({site.level for site in sites})
        self.frequencies = frequencies
        self.tokens = RegionTokens(
            text_width=backbone.phrase_width, width=width, hidden=hidden, frequencies=frequencies
        )
        self.places = PlaceMap(token_width=width, width=place_width, hidden=hidden) if place_width else None
        self.paths = [site.path for site in sites]
        self.attentions = nn.ModuleList(
            RegionalAttention(site, token_width=width, place_width=place_width) for site in sites
        )
        if weights is not None:
            load_weights(self, weights, backbone=backbone)

    def settings(self) -> dict[str, Any]:
        """Every width, the frequencies and the blocks."""
        return self._settings

    def slot_modules(self) -> dict[str, nn.Module]:
        """One attention for each chosen block."""
        return dict(zip(self.paths, self.attentions, strict=True))

    def gates(self) -> dict[str, float]:
        """Mean magnitude of each output projection, by block path: 0 at initialisation."""
        attentions = cast(list[RegionalAttention], list(self.attentions))
        return gate_figures({path: a.to_out.weight for path, a in zip(self.paths, attentions, strict=True)})

    def forward(self, scenes: SceneBatch, text: Text, latent_size: tuple[int, int]) -> AdapterOutput:
        """Region tokens and where they apply, for B scenes; an empty batch of objects is B null conditions."""
        boxes, valid = _at_least_one(scenes)
        words, open_words, ends = _phrase_tokens(scenes, valid, text)
        tokens = self.tokens(words, boxes)
        whole = tokens.gather(2, ends[..., None, None].expand(-1, -1, 1, tokens.shape[-1])).squeeze(2)
        levels = {}
        for level in self.levels:
            size = (-(-latent_size[0] // 2**level), -(-latent_size[1] // 2**level))
            under = cover(boxes, valid, height=size[0], width=size[1]).flatten(2).transpose(1, 2)
            mask = (under[..., None] & open_words[:, None]).flatten(2)
            covered = mask.any(dim=-1, keepdim=True)
            places = None if self.places is None else self.places(whole, boxes, valid, size)
            levels[size[0] * size[1]] = RegionLevel(mask=mask | ~covered, covered=covered, places=places)
        return AdapterOutput(payload=RegionPayload(tokens=tokens.flatten(1, 2), levels=levels))


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


def _at_least_one(scenes: SceneBatch) -> tuple[Tensor, Tensor]:
    """Boxes (B, N, 4) and valid (B, N), with one absent object where no scene has any, so that no axis is empty."""
    if scenes.boxes.shape[1]:
        return scenes.boxes, scenes.valid
    return scenes.boxes.new_zeros(len(scenes), 1, 4), scenes.valid.new_zeros(len(scenes), 1)


def _phrase_tokens(scenes: SceneBatch, valid: Tensor, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """Words (B, N, T, C) of every object, which of them count (B, N, T), and where each phrase ends (B, N).

    Objects that are not valid have no word that counts. The last word of a phrase has seen all of it.
    """
    count = valid.shape[1]
    phrases = [phrase for row in scenes.phrases for phrase in [*row, *[""] * (count - len(row))]]
    features = text.phrases(phrases)
    words = features.last_hidden.unflatten(0, (len(scenes), count))
    open_words = features.mask.unflatten(0, (len(scenes), count)) & valid[..., None]
    return words, open_words, (features.lengths - 1).unflatten(0, (len(scenes), count))
