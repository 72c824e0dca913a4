"""The scene-graph method: objects and relations act on the prompt tokens; the UNet is not touched.

The published encoder lives in `triple_conv`, one of our own in `transformer`; weights of others are read in `weights`.

Legend: B scenes, T prompt tokens, C width of a prompt token.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.conditioning.adapter_file import load_weights
from models.conditioning.base import Adapter, AdapterOutput, Reading, Text, gate_figures
from models.conditioning.scene_graph.transformer import TransformerEncoder, node_graph, node_strings
from models.conditioning.scene_graph.triple_conv import (
    TripleConvEncoder,
    graph_strings,
    published_tensors,
    token_graph,
)
from models.conditioning.scene_graph.weights import read_checkpoint, write_checkpoint
from scenes.graph import linearise

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from scenes import SceneBatch

CHOICES = {"encoder": ("triple_conv", "transformer"), "prompt": ("triples", "caption")}


class SceneGraphAdapter(Adapter):
    """A scene graph added to the prompt tokens, as SDXL-SG publishes it.

    A scene without objects keeps its caption, exactly as the bare backbone reads it.

    Args:
        backbone: the denoiser to fit; read for its text width and length, not kept.
        encoder: "triple_conv" is the published graph network over single tokens, added to the prompt place by place: what the
            prompt has no place for (75 tokens of CLIP) is left out and counted. "transformer" is our own, over objects and
            relations, of which there may be any number.
        prompt: the text beneath: "triples", as published: subject, predicate and object of every relation, then the objects in
            none, in the caption's place, filled up with the end token; or the "caption".
        width: of a node.
        hidden: between the layers.
        layers: graph convolutions after the first, or transformer blocks.
        heads: of the transformer.
        weights: where to start from: an adapter file, or a checkpoint of the published training; None starts at random with a
            closed gate.

    Attributes:
        tokens_cut: tokens of texts that were beyond the encoder's length, and tokens of graphs without a place, so far.

    Raises:
        ValueError: an unknown choice, or weights that do not fit.

    Source:
        Li et al., "LAION-SG: An Enhanced Large-Scale Dataset for Training Complex Image-Text Models with Structural
        Annotations" (arXiv 2412.08580).
    """

    method = "scene_graph"
    requires = frozenset({"phrases", "relations"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        encoder: str = "triple_conv",
        prompt: str = "triples",
        width: int = 512,
        hidden: int = 512,
        layers: int = 5,
        heads: int = 8,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        for setting, value in (("encoder", encoder), ("prompt", prompt)):
            if value not in CHOICES[setting]:
                raise ValueError(
                    f"conditioning.scene_graph.{setting}: {value!r} is unknown; take {' or '.join(CHOICES[setting])}"
                )
        self._settings = {"encoder": encoder, "prompt": prompt, "width": width, "hidden": hidden, "layers": layers}
        self._settings["heads"] = heads
        self.prompt, self.tokens_cut = prompt, 0
        sizes = {"token_width": backbone.text_width, "width": width, "hidden": hidden, "layers": layers}
        self.encoder: TripleConvEncoder | TransformerEncoder = (
            TripleConvEncoder(**sizes) if encoder == "triple_conv" else TransformerEncoder(**sizes, heads=heads)
        )
        if weights is not None:
            load_weights(self, weights, backbone=backbone)

    def settings(self) -> dict[str, Any]:
        """Everything but where it starts."""
        return self._settings

    def published(self) -> dict[str, Tensor]:
        """Its tensors, of the published encoder under the published names."""
        if isinstance(self.encoder, TripleConvEncoder):
            return published_tensors(self.encoder)
        return super().published()

    def read_published(self, path: str) -> dict[str, Tensor]:
        """The tensors of a checkpoint of the published training.

        Args:
            path: as in `weights.read_checkpoint`.

        Returns:
            Tensors by published name.
        """
        if isinstance(self.encoder, TripleConvEncoder):
            return read_checkpoint(path)
        return super().read_published(path)

    def export(self, backbone: Backbone, out: Path, *, form: str) -> None:
        """Writes a checkpoint that the published scripts load, with `form="published"`.

        Args:
            backbone: not read.
            out: a `.pt` file.
            form: "published".
        """
        if form != "published" or not isinstance(self.encoder, TripleConvEncoder):
            raise ValueError(
                f"form={form}: conditioning.scene_graph with encoder={self._settings['encoder']} has no such form; take "
                "form=adapter, or form=published with encoder=triple_conv"
            )
        write_checkpoint(self.published(), out)

    def gates(self) -> dict[str, float]:
        """Magnitude of the gate: 0 at initialisation."""
        return gate_figures({"graph": self.encoder.gate})

    def counts(self) -> dict[str, int]:
        """Tokens that were cut."""
        return {"tokens": self.tokens_cut}

    def reading(self, scenes: SceneBatch) -> Reading:
        """The triples in the captions' place, where that is set, and every string of the graph."""
        strings = graph_strings if isinstance(self.encoder, TripleConvEncoder) else node_strings
        prompts = self._texts(scenes) if self.prompt == "triples" else ()
        return Reading(prompts=prompts, tokens=strings(scenes))

    def forward(self, scenes: SceneBatch, text: Text, latent_size: tuple[int, int]) -> AdapterOutput:
        """The prompt with the graph added.

        Args:
            scenes: B scenes.
            text: the prompt, and the tokens of what `reading` has asked for.
            latent_size: not read.

        Returns:
            Another prompt (B, T, C), its pooled vector unchanged.
        """
        prompt, length = text.prompt, text.prompt.tokens.shape[1]
        texts = self._texts(scenes) if self.prompt == "triples" else [None] * len(scenes)
        cut = sum(text.tokens.cut.get(each, 0) for each in texts if each is not None)
        # without any string there is nothing to take a token from, but every weight still has its gradient of 0
        hidden = text.tokens.hidden.to(prompt.tokens) if text.tokens.spans else torch.zeros_like(prompt.tokens[0, :1])
        if isinstance(self.encoder, TripleConvEncoder):
            room = [length - 2 if each is None else len(text.tokens.inner(each)) for each in texts]
            graph = token_graph(scenes, text.tokens, room, length=length)
            cut = max(cut, graph.left_out)
            tokens = self.encoder(hidden, graph, prompt.tokens)
        else:
            tokens = self.encoder(hidden, node_graph(scenes, text.tokens), prompt.tokens)
        self.tokens_cut += cut
        return AdapterOutput(prompt=replace(prompt, tokens=tokens))

    @staticmethod
    def _texts(scenes: SceneBatch) -> list[str | None]:
        """The graph of each scene as one text, parted as published by nothing but spaces; None without objects."""
        return [linearise(scene, separator=" ") if scene.objects else None for scene in scenes.scenes]
