"""The regions method: each image position attends to the text of the boxes that cover it.

By default the function, the weights and their names are the published ones; what is computed once there is said in `attention`,
`tokens` and `levels`. `union` holds a form of our own for small pictures. Weights of others are read in `weights`.

Legend: B pictures, N objects, D width of a region token, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from models.conditioning.adapter_file import load_weights
from models.conditioning.base import Adapter, AdapterOutput, Text, gate_figures
from models.conditioning.regions.attention import RegionalAttention, RegionPayload
from models.conditioning.regions.levels import batch_regions, region_level
from models.conditioning.regions.tokens import RegionText, RegionTokens, RegionWriter
from models.conditioning.regions.union import PlaceMap, UnionAttention, union_payload
from models.conditioning.regions.weights import published_tensors, read_regional
from models.conditioning.slots import block_sites
from scenes.regions import Rasterise

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from scenes import SceneBatch, SceneObject

CHOICES = {
    "variant": ("ca", "casa", "union"),
    "rasterise": ("exact", "published"),
    "overflow": ("joined", "per_object"),
    "text": ("description", "phrase"),
}


class RegionsAdapter(Adapter):
    """Regional cross-attention over the text of boxes.

    Args:
        backbone: the denoiser to fit; read for its block sites, text width and tokenizer, not kept.
        variant: "ca" is the published regional cross-attention, "casa" has self-attention among a region's boxes after it.
            "union" is our own: no partition, a position's words are those of all its boxes, each encoded on its own.
        rasterise: how boxes become regions: "exact", or "published", which loses thin boxes and the last row and column, as
            the published weights saw it. `union` is always exact.
        attention_weight_scale: factor on IoU - 1, which is added to the logits of an object's words.
        max_regions: how many regions of a picture act: in training any, drawn from torch's generator (30 as published), else
            those of most cells; the cells of the others get the null feature. None, no limit.
        overflow: "joined": the sentences of a region are joined by "; " and encoded together, as published; what is beyond the
            encoder's 77 tokens is cut. "per_object": each is encoded on its own. What was cut is counted in `text_cut`.
        text: of an object, its "description" (its phrase where that is empty) or its "phrase".
        width: D; None takes the width of prompt tokens, as published.
        hidden: width inside the token network.
        frequencies: Fourier frequencies of a box.
        place_width: width of the place map (`union` alone): what each position knows about its place in the boxes that touch
            it, so that edges fall between cells. 0 leaves the map out.
        blocks: "all" as published, or some of down, mid, up.
        weights: where to start from: an adapter file, the folder that the published script made, its name on the hub, or a
            checkpoint of its training; None starts at random with closed gates.

    Attributes:
        text_cut: tokens cut so far, counted once for each region (joined) or object (per_object).
        regions_left_out: regions beyond `max_regions` so far.

    Raises:
        ValueError: an unknown choice, a limit below 1, a place map without `union`, or weights that do not fit.
    """

    method = "regions"
    requires = frozenset({"boxes", "phrases"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        variant: str = "ca",
        rasterise: Rasterise = "exact",
        attention_weight_scale: float = 1.0,
        max_regions: int | None = None,
        overflow: str = "joined",
        text: str = "description",
        width: int | None = None,
        hidden: int = 512,
        frequencies: int = 8,
        place_width: int = 0,
        blocks: str | Sequence[str] = "all",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self._settings = {
            "variant": variant,
            "rasterise": rasterise,
            "attention_weight_scale": attention_weight_scale,
            "overflow": overflow,
            "text": text,
            "width": width or backbone.text_width,
            "hidden": hidden,
            "frequencies": frequencies,
            "place_width": place_width,
            "blocks": blocks if isinstance(blocks, str) else list(blocks),
        }
        _check(self._settings, max_regions)
        sites = block_sites(backbone.unet, blocks)
        token_width: int = self._settings["width"]
        self.rasterise: Rasterise = rasterise
        self.variant, self.text, self.max_regions = variant, text, max_regions
        self.text_cut = self.regions_left_out = 0
        self.writer = RegionWriter(
            tokenise=_Tokeniser(backbone),
            max_length=backbone.text.max_length,
            overflow=overflow,
            scale=attention_weight_scale,
        )
        self.levels = sorted({site.level for site in sites})
        self.position_net = RegionTokens(
            text_width=backbone.phrase_width, width=token_width, hidden=hidden, frequencies=frequencies
        )
        self.places = PlaceMap(token_width=token_width, width=place_width, hidden=hidden) if place_width else None
        self.paths = [site.path for site in sites]
        self.attentions = nn.ModuleList(
            UnionAttention(site, token_width=token_width, place_width=place_width)
            if variant == "union"
            else RegionalAttention(site, token_width=token_width, place=place, within=variant == "casa")
            for place, site in enumerate(sites)
        )
        if weights is not None:
            load_weights(self, weights, backbone=backbone)

    def settings(self) -> dict[str, Any]:
        """Everything but where it starts and how many regions act."""
        return self._settings

    def published(self) -> dict[str, Tensor]:
        """Its tensors under the published names."""
        return published_tensors(self)

    def read_published(self, path: str) -> dict[str, Tensor]:
        """The tensors of a UNet that the published script has made, or of a checkpoint of its training.

        Args:
            path: as in `weights.read_regional`.

        Returns:
            Tensors by published name.
        """
        return read_regional(path, variant=self.variant)

    def slot_modules(self) -> dict[str, nn.Module]:
        """One attention for each chosen block."""
        return dict(zip(self.paths, self.attentions, strict=True))

    def gates(self) -> dict[str, float]:
        """Mean magnitude of each output projection, by block path: 0 at initialisation."""
        attentions = cast(list[RegionalAttention], list(self.attentions))
        return gate_figures({path: each.gate for path, each in zip(self.paths, attentions, strict=True)})

    def counts(self) -> dict[str, int]:
        """Tokens that were cut, and regions beyond the limit."""
        return {"tokens": self.text_cut, "regions": self.regions_left_out}

    def forward(self, scenes: SceneBatch, text: Text, latent_size: tuple[int, int]) -> AdapterOutput:
        """Region tokens and where they apply, for B scenes; a scene without boxes is the null condition.

        Where no gradient is asked for, keys and values are computed here too: once a picture and not once a step.
        """
        sizes = [(-(-latent_size[0] // 2**level), -(-latent_size[1] // 2**level)) for level in self.levels]
        texts = [[self._text_of(item) for item in scene.objects] for scene in scenes.scenes]
        if self.variant == "union":
            payload = union_payload(scenes, texts, text, sizes, tokens_of=self.position_net, places_of=self.places)
            return AdapterOutput(payload=payload)
        return AdapterOutput(payload=self._regional(scenes, texts, text, latent_size, sizes))

    def _regional(
        self,
        scenes: SceneBatch,
        texts: list[list[str]],
        text: Text,
        latent_size: tuple[int, int],
        sizes: list[tuple[int, int]],
    ) -> RegionPayload:
        regions = batch_regions(
            scenes, latent_size, rasterise=self.rasterise, most=self.max_regions, at_random=self.training
        )
        boxes = scenes.host[0].tolist()
        written = [
            RegionText(
                texts=[texts[picture][place] for place in inside],
                boxes=[tuple(boxes[picture][place]) for place in inside],
                iou=shares,
                scope=picture,
                names=inside,
            )
            for picture, inside, shares in zip(regions.owner, regions.members, regions.iou, strict=True)
        ]
        words = self.writer(written, text.phrases, scenes.boxes.device)
        self.text_cut += words.cut
        self.regions_left_out += regions.left_out
        tokens = self.position_net(words.features, words.boxes)
        levels = {
            size[0] * size[1]: region_level(
                regions,
                words.rows,
                size,
                rasterise=self.rasterise,
                within=self.variant == "casa",
                dtype=tokens.dtype,
            )
            for size in sizes
        }
        attentions = cast(list[RegionalAttention], list(self.attentions))
        kept = () if torch.is_grad_enabled() else tuple(each.project(tokens) for each in attentions)
        return RegionPayload(tokens=tokens, levels=levels, kept=kept)

    def _text_of(self, item: SceneObject) -> str:
        return (item.description if self.text == "description" else "") or item.phrase


class _Tokeniser:
    """Token ids of strings, start and end token included; holds the tokenizer alone, not its encoder."""

    def __init__(self, backbone: Backbone) -> None:
        self.tokenizer = backbone.text.each[0].tokenizer

    def __call__(self, strings: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(strings), truncation=False, verbose=False)["input_ids"]


def _check(settings: dict[str, Any], max_regions: int | None) -> None:
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"conditioning.regions.{name}: {settings[name]!r} is unknown; take {', '.join(choices)}")
    if max_regions is not None and max_regions < 1:
        raise ValueError(f"conditioning.regions.max_regions: {max_regions} is less than 1; take null for any number")
    if settings["place_width"] and settings["variant"] != "union":
        raise ValueError(
            f"conditioning.regions.place_width: {settings['place_width']} with variant={settings['variant']}, which has no "
            "place map; set it to 0, or take variant=union"
        )
