"""The scene-graph encoding as its authors compute it, written anew: one string, one scene, one edge after another.

The other side of `benchmarks.graphs`, and what the tests hold the batched encoder against. Nothing here is shared with it but the
weights. Every mention of a string runs through both text encoders by itself, without padding, and so does "-" for every scene;
objects in no relation are encoded too, and not used.

Legend: n tokens of a string, C width of a prompt token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.backbones.base import Backbone
from models.conditioning.scene_graph.triple_conv import TripleConvEncoder
from models.text import TextTowers
from scenes import Scene

LENGTH = 77


class _Graph:
    """Token features of the nodes and edges of one scene, and where its triples lie in them."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []
        self.edges: list[Tensor] = []
        self.ends: list[tuple[int, int]] = []
        self.triples: list[tuple[range, range, range]] = []

    def mention(self, tokens: Tensor, dash: Tensor) -> range:
        """Puts an object's tokens down; all but the last point at the last."""
        begin = len(self.nodes)
        self.nodes += list(tokens)
        last = len(self.nodes) - 1
        for node in range(begin, last):
            self.edges.append(dash)
            self.ends.append((node, last))
        return range(begin, last + 1)


@torch.no_grad()
def encode(text: TextTowers, string: str) -> tuple[Tensor, Tensor | None]:
    """One string: its tokens (n, C) with start and end, and its pooled vector (1, P) where captions have one."""
    features = text.encode_phrases([string])
    hidden = features.last_hidden if text.caption_layer == "last" else features.penultimate_hidden
    return hidden[0], features.projected if text.caption_pooled else None


def published_prompt(backbone: Backbone, encoder: TripleConvEncoder, scene: Scene) -> tuple[Tensor, Tensor | None]:
    """Prompt tokens (1, 77, C) and the pooled vector of one scene.

    Args:
        backbone: whose text encoders read; its cache of phrases must be off.
        encoder: whose weights are taken.
        scene: one scene with relations.

    Returns:
        What the denoiser takes.
    """
    text, graph = backbone.text, _Graph()
    dash = encode(text, "-")[0][1]
    for relation in scene.relations:
        subject, predicate, obj = (
            encode(text, string)[0][1:-1]
            for string in (
                scene.objects[relation.subject].phrase,
                relation.predicate,
                scene.objects[relation.object].phrase,
            )
        )
        first, second = graph.mention(subject, dash), graph.mention(obj, dash)
        begin = len(graph.edges)
        for token in predicate:
            graph.edges.append(token)
            graph.ends.append((first[-1], second[-1]))
        graph.triples.append((first, range(begin, len(graph.edges)), second))
    related = {place for relation in scene.relations for place in (relation.subject, relation.object)}
    alone = [item.phrase for place, item in enumerate(scene.objects) if place not in related]
    for phrase in alone:
        encode(text, phrase)
    strings = [
        string
        for relation in scene.relations
        for string in (
            scene.objects[relation.subject].phrase,
            relation.predicate,
            scene.objects[relation.object].phrase,
        )
    ]
    whole, pooled = encode(text, " ".join([*strings, *alone]))
    inner = whole[1:-1].clone()
    if graph.triples:
        nodes, edges = _convolved(encoder, graph)
        parts = [
            part
            for first, between, second in graph.triples
            for part in (
                nodes[first.start : first.stop],
                edges[between.start : between.stop],
                nodes[second.start : second.stop],
            )
        ]
        added = torch.cat(parts)[: len(inner)]
        inner[: len(added)] += encoder.alpha_obj * added
    tokens = torch.cat([whole[:1], inner, whole[-1:].repeat(LENGTH - 1 - len(inner), 1)])
    return tokens[None], pooled


def _convolved(encoder: TripleConvEncoder, graph: _Graph) -> tuple[Tensor, Tensor]:
    """Nodes and edges (., C) of one scene after the graph network."""
    nodes = encoder.projection_mlp_1(torch.stack(graph.nodes))
    edges = encoder.projection_mlp_1(torch.stack(graph.edges))
    for layer in (encoder.graph_conv, *encoder.graph_net.gconvs):
        nodes, edges = _layer(layer, nodes, edges, graph.ends)
    return tuple(encoder.projection_mlp_2(functional.normalize(each, dim=1)) for each in (nodes, edges))  # type: ignore[return-value]


def _layer(layer: Any, nodes: Tensor, edges: Tensor, ends: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """One convolution over triples with the mean at every node."""
    table = torch.tensor(ends, device=nodes.device)
    subjects, objects = table[:, 0], table[:, 1]
    new = layer.net1(torch.cat([nodes[subjects], edges, nodes[objects]], dim=1))
    width, hidden = edges.shape[1], (new.shape[1] - edges.shape[1]) // 2
    summed = torch.zeros(len(nodes), hidden, device=nodes.device, dtype=nodes.dtype)
    counts = torch.zeros(len(nodes), device=nodes.device, dtype=nodes.dtype)
    for place, share in ((subjects, new[:, :hidden]), (objects, new[:, hidden + width :])):
        summed = summed.scatter_add(0, place[:, None].expand_as(share), share)
        counts = counts.scatter_add(0, place, torch.ones(len(place), device=nodes.device, dtype=nodes.dtype))
    return layer.net2(summed / counts.clamp(min=1)[:, None]), new[:, hidden : hidden + width]
