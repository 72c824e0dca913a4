"""The boxes method (GLIGEN): a token for each box with its phrase, and gated self-attention in every block's slot.

The weights, their names and the function are those of diffusers' `attention_type="gated"` UNet, so that published ones come
and go unchanged. There a scene is padded to a fixed number of slots with null tokens that take part in the attention; here
all null tokens of a scene are one key whose logit is raised by the log of their number, which is the same and costs less.
Weights of others are read in `weights` and written in `export`; geometry lives in `models.conditioning.geometry`.

Legend: B pictures, N objects, L positions of a block, C its width, D width of a grounding token, P width of a phrase vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional

from models.conditioning.base import Adapter, AdapterOutput, Text
from models.conditioning.boxes.weights import initialise, published_tensors, read_gated
from models.conditioning.geometry import fourier
from models.conditioning.slots import BlockSite, block_sites
from models.text import PhraseFeatures
from scenes.regions import cover

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from scenes import Scene, SceneBatch

FREQUENCIES = 8
HIDDEN = 512
MASKS = ("none", "box")
OVERFLOWS = ("refuse", "largest", "score")
CLOSED_BY = ("gates", "projections")


@dataclass(frozen=True, kw_only=True)
class BoxPayload:
    """What every block reads.

    Attributes:
        tokens: (B, N + 1, D) grounding tokens, the null token last.
        bias: by number of positions L, the attention logits' bias of the tokens: (B, 1, 1, N + 1), or (B, 1, L, N + 1) where
            a position sees only the boxes that cover it. -inf closes an absent object; the null token has the log of
            the number of empty slots.
        under: by L, (B, L, N) bool, the boxes that cover a position, where the attention is to learn them; else empty.
        losses: where every block puts its (B,) loss for what its positions attend to.
    """

    tokens: Tensor
    bias: dict[int, Tensor]
    under: dict[int, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)


class PositionNet(nn.Module):
    """Grounding tokens of phrase vectors and boxes; keys as diffusers' `GLIGENTextBoundingboxProjection`.

    Args:
        phrase_width: P.
        width: D.

    Source:
        GLIGEN (Li et al. 2023), eq. 5 and 6.
    """

    def __init__(self, *, phrase_width: int, width: int) -> None:
        super().__init__()
        self.phrase_width = phrase_width
        self.linears = nn.Sequential(
            nn.Linear(phrase_width + 8 * FREQUENCIES, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, width),
        )
        self.null_positive_feature = nn.Parameter(torch.zeros(phrase_width))
        self.null_position_feature = nn.Parameter(torch.zeros(8 * FREQUENCIES))

    def forward(self, phrases: Tensor, boxes: Tensor) -> Tensor:
        """Tokens (B, N + 1, D), the null token last, of phrase vectors (B, N, P) and boxes (B, N, 4) xyxy in [0, 1]."""
        where = fourier(boxes, FREQUENCIES).to(phrases.dtype)
        null = torch.cat([self.null_positive_feature, self.null_position_feature]).to(phrases.dtype)
        features = torch.cat([phrases, where], dim=-1)
        return self.linears(torch.cat([features, null.expand(len(boxes), 1, -1)], dim=1))


class GatedSelfAttention(nn.Module):
    """Self-attention over image positions and grounding tokens, behind a gate; keys as diffusers' `GatedSelfAttentionDense`.

    Nothing is added at initialisation: the gates start at 0.

    Args:
        site: the block.
        token_width: D.

    Source:
        GLIGEN (Li et al. 2023), eq. 8.
    """

    def __init__(self, site: BlockSite, *, token_width: int) -> None:
        super().__init__()
        inner = site.heads * site.head_width
        self.heads = site.heads
        self.linear = nn.Linear(token_width, site.width)
        self.attn = nn.ModuleDict(
            {
                "to_q": nn.Linear(site.width, inner, bias=False),
                "to_k": nn.Linear(site.width, inner, bias=False),
                "to_v": nn.Linear(site.width, inner, bias=False),
                "to_out": nn.ModuleList([nn.Linear(inner, site.width)]),
            }
        )
        self.ff = FeedForward(site.width, activation_fn="geglu")
        self.norm1 = nn.LayerNorm(site.width)
        self.norm2 = nn.LayerNorm(site.width)
        self.alpha_attn = nn.Parameter(torch.zeros(1))  # published as scalars, which FSDP2 refuses
        self.alpha_dense = nn.Parameter(torch.zeros(1))

    def open_gates(self) -> None:
        """Opens both gates, and has the layers in front of them give zeros."""
        for gate in (self.alpha_attn, self.alpha_dense):
            nn.init.ones_(gate)
        for last in (cast(nn.ModuleList, self.attn["to_out"])[0], self.ff.net[-1]):
            nn.init.zeros_(cast(nn.Linear, last).weight)
            nn.init.zeros_(cast(nn.Linear, last).bias)

    def forward(self, hidden: Tensor, payload: BoxPayload) -> Tensor:
        """Hidden states (B, L, C) after the gated layers."""
        image, tokens = self.norm1(hidden), self.norm1(self.linear(payload.tokens.to(hidden.dtype)))
        query = self._split(self.attn["to_q"](image))
        both = torch.cat([image, tokens], dim=1)
        key, value = self._split(self.attn["to_k"](both)), self._split(self.attn["to_v"](both))
        length = hidden.shape[1]
        bias = functional.pad(payload.bias[length], (length, 0)).to(query.dtype)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if payload.under:
            payload.losses.append(attention_loss(query, key, bias, payload.under[length]))
        found = cast(nn.ModuleList, self.attn["to_out"])[0](found.transpose(1, 2).flatten(2))
        hidden = hidden + self.alpha_attn.tanh() * found
        return hidden + self.alpha_dense.tanh() * self.ff(self.norm2(hidden))

    def _split(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attention_loss(query: Tensor, key: Tensor, bias: Tensor, under: Tensor) -> Tensor:
    """How far the attention is from looking at the boxes that cover a position, and elsewhere at no box.

    The share that goes to each object is what attention gives for values that say which key is which object, so that no
    matrix of logits is kept.

    Args:
        query: (B, heads, L, c) of the positions.
        key: (B, heads, L + N + 1, c) of the positions, the objects and the null token.
        bias: logits' bias, which goes with (B, heads, L, L + N + 1).
        under: (B, L, N) bool, the boxes that cover a position.

    Returns:
        (B,) minus the log of the share that goes where it should, mean over heads and positions, in nats.
    """
    length, count = under.shape[1:]
    which = functional.pad(torch.eye(count, dtype=query.dtype, device=query.device), (0, 0, length, 1))
    shares = functional.scaled_dot_product_attention(
        query, key, which.expand(*key.shape[:2], -1, -1), attn_mask=bias
    ).float()
    mine = (shares * under[:, None]).sum(dim=-1)
    right = torch.where(under.any(dim=-1)[:, None], mine, 1 - shares.sum(dim=-1))
    return -right.clamp_min(1e-6).log().mean(dim=(1, 2))


class BoxesAdapter(Adapter):
    """Boxes with phrases by gated self-attention, as GLIGEN and IGLIGEN publish them.

    Args:
        backbone: the denoiser to fit; read for its block sites and widths, not kept.
        slots: tokens that a scene is padded to. The null tokens of the empty ones take part in the attention, so that the
            number belongs to the weights: 30 in diffusers' pipelines and on COCO, 32 in IGLIGEN-XL's training.
        overflow: what happens to a scene with more boxes than slots: "refuse" it, or keep the "largest" boxes (as on COCO)
            or those of the highest "score" (as on SA-1B); what went is counted in `left_out`.
        mask: "none" as published; "box" lets a position see only the boxes that cover it (not part of GLIGEN).
        blocks: "all" as published, or some of down, mid, up.
        closed_by: what keeps a fresh adapter from adding anything: "gates" at 0, as published, or "projections", the last
            layers of attention and feed-forward at 0 behind gates that are open. A closed gate passes on hardly any gradient,
            so that grounding begins late; the function and its weights are the same.
        attention_loss: weight of a loss, in training, that draws each position's attention to the boxes that cover it; 0 as
            published. It changes how soon the adapter grounds, not what it computes (docs/decisions/0009).
        weights: where to start from: an adapter file, or a UNet folder or hub name with `attention_type="gated"`; None
            starts at random.
        init: what is taken from `weights`: "published" all of it; "reset" the gates and null features alone (where there
            are weights), every other layer anew, as the published COCO run did; "fresh" nothing.

    Raises:
        ValueError: an unknown choice, weights that are missing or not used, or that do not fit.
    """

    method = "boxes"
    requires = frozenset({"boxes", "phrases"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        slots: int = 30,
        overflow: str = "refuse",
        mask: str = "none",
        blocks: str | Sequence[str] = "all",
        closed_by: str = "gates",
        attention_loss: float = 0.0,
        weights: str | None = None,
        init: str = "fresh",
    ) -> None:
        super().__init__()
        chosen = (("overflow", overflow, OVERFLOWS), ("mask", mask, MASKS), ("closed_by", closed_by, CLOSED_BY))
        for setting, value, choices in chosen:
            if value not in choices:
                raise ValueError(f"conditioning.boxes.{setting}: {value!r} is unknown; take {', '.join(choices)}")
        if slots < 1:
            raise ValueError(f"conditioning.boxes.slots: {slots} is less than 1; take 30, as published")
        if attention_loss < 0:
            raise ValueError(
                f"conditioning.boxes.attention_loss: {attention_loss} is negative; take 0, as published, or more"
            )
        if attention_loss and mask != "none":
            raise ValueError(
                f"conditioning.boxes.attention_loss: with mask={mask} positions see only their own boxes; take mask=none"
            )
        sites = block_sites(backbone.unet, blocks)
        self.attention_loss = attention_loss
        self.slots, self.overflow, self.mask, self.left_out = slots, overflow, mask, 0
        self.blocks = blocks if isinstance(blocks, str) else list(blocks)
        self.levels = sorted({site.level for site in sites})
        self.with_projection = backbone.has_pooled
        self.paths = [site.path for site in sites]
        # diffusers fixes both widths to that of the prompt tokens: 768 in SD 1.x, 1024 in SD 2.x, 2048 in SDXL
        self.position_net = PositionNet(phrase_width=backbone.text_width, width=backbone.text_width)
        self.fusers = nn.ModuleList(GatedSelfAttention(site, token_width=backbone.text_width) for site in sites)
        if closed_by == "projections":
            if init != "fresh":
                raise ValueError(
                    f"conditioning.boxes.closed_by: projections needs init=fresh, for init={init} brings its gates; take gates"
                )
            for fuser in cast(list[GatedSelfAttention], list(self.fusers)):
                fuser.open_gates()
        initialise(self, backbone=backbone, weights=weights, init=init)

    def settings(self) -> dict[str, Any]:
        """The number of slots, the mask and the blocks."""
        return {"slots": self.slots, "mask": self.mask, "blocks": self.blocks}

    def published(self) -> dict[str, Tensor]:
        """Its parameters under the names of a gated UNet."""
        return published_tensors(self)

    def read_published(self, path: str) -> dict[str, Tensor]:
        """The box tensors of a gated UNet: file, folder or hub name.

        Args:
            path: as in `weights.read_gated`.

        Returns:
            Tensors by published name.
        """
        return read_gated(path)

    def export(self, backbone: Backbone, out: Path, *, form: str) -> None:
        """Writes a pipeline folder in diffusers' layout, with `form="diffusers"`.

        Args:
            backbone: a Stable Diffusion model with weights.
            out: the folder, which is not there yet.
            form: "diffusers".
        """
        if form != "diffusers":
            raise ValueError(f"form={form}: conditioning.boxes has no such form; take form=adapter or form=diffusers")
        from models.conditioning.boxes.export import (
            export_pipeline,
        )  # brings diffusers' pipelines, which nothing else needs

        export_pipeline(self, backbone, out)

    def slot_modules(self) -> dict[str, nn.Module]:
        """One gated self-attention for each chosen block."""
        return dict(zip(self.paths, self.fusers, strict=True))

    def gates(self) -> dict[str, float]:
        """Tanh of both gates by block path: `<path>.attn` and `<path>.dense`."""
        fusers = cast(list[GatedSelfAttention], list(self.fusers))
        return {
            f"{path}.{name}": math.tanh(float(gate.detach()))
            for path, fuser in zip(self.paths, fusers, strict=True)
            for name, gate in (("attn", fuser.alpha_attn), ("dense", fuser.alpha_dense))
        }

    def counts(self) -> dict[str, int]:
        """Boxes beyond the slots."""
        return {"boxes": self.left_out}

    def forward(self, scenes: SceneBatch, text: Text, latent_size: tuple[int, int]) -> AdapterOutput:
        """Grounding tokens and their bias for B scenes; a scene without boxes is the published null condition.

        Args:
            scenes: B scenes.
            text: encodes their phrases.
            latent_size: (h, w) cells.

        Returns:
            A `BoxPayload`.

        Raises:
            ValueError: a scene with more boxes than slots, where `overflow` is "refuse", or one with a box and no phrase.
        """
        scenes = self._fit(scenes)
        count = scenes.boxes.shape[1]
        phrases = [phrase for row in scenes.phrases for phrase in [*row, *[""] * (count - len(row))]]
        vectors = phrase_vectors(text.phrases(phrases), with_projection=self.with_projection)
        tokens = self.position_net(vectors.unflatten(0, (len(scenes), count)), scenes.boxes)
        empty = (self.slots - scenes.valid.sum(dim=1, keepdim=True)).to(torch.float32).log()
        closed = torch.zeros(scenes.valid.shape, device=empty.device).masked_fill(~scenes.valid, -math.inf)
        bias = torch.cat([closed, empty], dim=1)[:, None, None]
        sizes = [(-(-latent_size[0] // 2**level), -(-latent_size[1] // 2**level)) for level in self.levels]
        under = {}
        if self.training and self.attention_loss:
            under = {h * w: _under(scenes, (h, w)) for h, w in sizes}
        return AdapterOutput(
            payload=BoxPayload(
                tokens=tokens, bias={h * w: self._bias(scenes, bias, (h, w)) for h, w in sizes}, under=under
            )
        )

    def losses(self, payload: BoxPayload) -> Tensor | None:
        """(B,) mean over the blocks of `attention_loss`, weighted; None where it is not asked for."""
        return self.attention_loss * torch.stack(payload.losses).mean(dim=0) if payload.losses else None

    def _bias(self, scenes: SceneBatch, bias: Tensor, size: tuple[int, int]) -> Tensor:
        if self.mask == "none":
            return bias
        outside = functional.pad(~_under(scenes, size), (0, 1))[
            :, None
        ]  # (B, 1, L, N + 1); the null token is everywhere
        return bias.expand(-1, -1, outside.shape[2], -1).masked_fill(outside, -math.inf)

    def _fit(self, scenes: SceneBatch) -> SceneBatch:
        """The scenes, none with more boxes than slots."""
        if all(len(scene.objects) <= self.slots for scene in scenes.scenes):
            return scenes
        return type(scenes)([self._fit_one(scene) for scene in scenes.scenes], device=scenes.device)

    def _fit_one(self, scene: Scene) -> Scene:
        boxed = [place for place, item in enumerate(scene.objects) if item.box is not None]
        if len(boxed) <= self.slots:
            return scene
        if self.overflow == "refuse":
            raise ValueError(
                f"scene {scene.id}: objects: {len(boxed)} boxes for conditioning.boxes.slots={self.slots}; raise slots, or "
                "set conditioning.boxes.overflow to largest or score"
            )
        by_score = self.overflow == "score"
        kept = sorted(boxed, key=lambda place: -_rank(scene, place, by_score=by_score))[: self.slots]
        self.left_out += len(boxed) - self.slots
        return replace(scene, objects=tuple(scene.objects[place] for place in sorted(kept)), relations=())


def _under(scenes: SceneBatch, size: tuple[int, int]) -> Tensor:
    """(B, L, N) bool: the boxes that cover each cell."""
    return cover(scenes.boxes, scenes.valid, height=size[0], width=size[1]).flatten(2).transpose(1, 2)


def phrase_vectors(features: PhraseFeatures, *, with_projection: bool) -> Tensor:
    """One vector for each of M phrases, as the published systems take it.

    Args:
        features: of M phrases.
        with_projection: False, the encoder's pooled output (SD); True, CLIP-L's pooled output and bigG's projected one side
            by side (SDXL).

    Returns:
        (M, P).
    """
    return (
        torch.cat([features.pooled, cast(Tensor, features.projected)], dim=-1) if with_projection else features.pooled
    )


def _rank(scene: Scene, place: int, *, by_score: bool) -> float:
    """What decides which boxes stay: the score, or the area."""
    item = scene.objects[place]
    if not by_score:
        x0, y0, x1, y1 = cast(tuple[float, float, float, float], item.box)
        return (x1 - x0) * (y1 - y0)
    if item.score is None:
        raise ValueError(
            f"scene {scene.id}: objects[{place}].score: missing, but conditioning.boxes.overflow=score; take largest"
        )
    return item.score
