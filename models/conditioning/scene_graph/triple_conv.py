"""The published graph encoder (SDXL-SG): a graph of single tokens, graph convolutions over triples, added to the prompt.

All scenes of a batch are one graph: tables of places, made once from the strings, say which token is which node, which edge goes
where, and which place of the prompt it is added to. Nothing here reads text; that is done once, in `Conditioning.read`.

Legend: B scenes, T prompt tokens, C width of a prompt token, O nodes, E edges, S distinct tokens, F places of prompts that get
something, D width of a node, H width between the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scenes.graph import triples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.packing import Tokens
    from scenes import SceneBatch

ATTRIBUTE = "-"
"""What stands on the edge from a token of an object to the object's last one, as published."""


@dataclass(frozen=True, kw_only=True)
class TokenGraph:
    """B scenes as one graph of tokens. Every mention of an object is nodes of its own, as published.

    Attributes:
        tokens: (S,) int64 where the distinct tokens lie in `Tokens.hidden`.
        nodes: (O,) int64 which of them each node is.
        edges: (E,) int64 which of them each edge is.
        subjects: (E,) int64 node that an edge comes from.
        objects: (E,) int64 node that it goes to.
        degree: (O, 1) float32 edges at each node, at least 1.
        source: (F,) int64 node, or O + edge, that is added to the prompts.
        target: (F,) int64 its place in B * T.
        left_out: nodes and relation tokens that found no place in their prompt.
    """

    tokens: Tensor
    nodes: Tensor
    edges: Tensor
    subjects: Tensor
    objects: Tensor
    degree: Tensor
    source: Tensor
    target: Tensor
    left_out: int


class _Draft:
    """The tables of a graph while it is put together: plain lists."""

    def __init__(self, tokens: Tokens) -> None:
        self.read = tokens
        self.distinct: dict[int, int] = {}  # place in Tokens.hidden -> number
        self.nodes: list[int] = []
        self.edges: list[int] = []
        self.ends: list[tuple[int, int]] = []
        self.source: list[tuple[bool, int]] = []  # whether an edge, and its number
        self.target: list[int] = []

    def _number(self, place: int) -> int:
        return self.distinct.setdefault(place, len(self.distinct))

    def mention(self, phrase: str) -> list[int]:
        """The nodes of an object: every token but the last points at the last one."""
        nodes = []
        for place in self.read.inner(phrase):
            nodes.append(len(self.nodes))
            self.nodes.append(self._number(place))
        if not nodes:
            raise ValueError(f"objects: {phrase!r} has no token; give it words")
        for node in nodes[:-1]:
            self._edge(self.read.inner(ATTRIBUTE)[0], node, nodes[-1])
        return nodes

    def _edge(self, place: int, subject: int, obj: int) -> int:
        self.edges.append(self._number(place))
        self.ends.append((subject, obj))
        return len(self.edges) - 1

    def triple(self, subject: str, predicate: str, obj: str) -> list[tuple[bool, int]]:
        """Adds a triple; gives its nodes and relation edges in the order in which they stand in the text."""
        first, second = self.mention(subject), self.mention(obj)
        between = [self._edge(place, first[-1], second[-1]) for place in self.read.inner(predicate)]
        return [*((False, n) for n in first), *((True, n) for n in between), *((False, n) for n in second)]


def token_graph(scenes: SceneBatch, tokens: Tokens, room: Sequence[int], *, length: int) -> TokenGraph:
    """The graph of B scenes.

    Args:
        scenes: B scenes.
        tokens: what was read of `graph_strings`.
        room: B places of each prompt, after its start token, that something may be added to.
        length: T.

    Returns:
        The graph, on the device of the tokens.
    """
    draft, left_out = _Draft(tokens), 0
    for number, scene in enumerate(scenes.scenes):
        order = [each for triple in triples(scene) for each in draft.triple(*triple)]
        kept = order[: room[number]]
        draft.source += kept
        draft.target += range(number * length + 1, number * length + 1 + len(kept))
        left_out += len(order) - len(kept)
    device, count = tokens.hidden.device, len(draft.nodes)

    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    subjects, objects = ([ends[side] for ends in draft.ends] for side in (0, 1))
    degree = torch.bincount(torch.tensor(subjects + objects, dtype=torch.int64), minlength=count)
    return TokenGraph(
        tokens=table(list(draft.distinct)),
        nodes=table(draft.nodes),
        edges=table(draft.edges),
        subjects=table(subjects),
        objects=table(objects),
        degree=degree.clamp_min(1).float()[:, None].to(device),
        source=table([count * is_edge + place for is_edge, place in draft.source]),
        target=table(draft.target),
        left_out=left_out,
    )


def graph_strings(scenes: SceneBatch) -> list[str]:
    """Everything whose tokens `token_graph` takes: the objects and predicates of all triples."""
    strings = [string for scene in scenes.scenes for triple in triples(scene) for string in triple]
    return [ATTRIBUTE, *strings] if strings else []


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU after each, the last one too."""
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())))


class GraphTripleConv(nn.Module):
    """One convolution: every edge with its two ends through `net1`, their mean at every node through `net2`.

    Args:
        width: D.
        hidden: H.

    Source:
        Johnson et al., "Image Generation from Scene Graphs" (CVPR 2018), section 3.
    """

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.net1 = _layers(3 * width, hidden, 2 * hidden + width)
        self.net2 = _layers(hidden, hidden, width)
        self.widths = [hidden, width, hidden]

    def forward(self, nodes: Tensor, edges: Tensor, graph: TokenGraph) -> tuple[Tensor, Tensor]:
        """Nodes (O, D) and edges (E, D) after the convolution."""
        ends = nodes.index_select(0, graph.subjects), nodes.index_select(0, graph.objects)
        to_subjects, edges, to_objects = self.net1(torch.cat([ends[0], edges, ends[1]], dim=-1)).split(self.widths, -1)
        summed = to_subjects.new_zeros(len(nodes), self.widths[0])
        summed = summed.index_add(0, graph.subjects, to_subjects).index_add(0, graph.objects, to_objects)
        return self.net2(summed / graph.degree.to(summed.dtype)), edges


class GraphTripleConvNet(nn.Module):
    """Convolutions one after another; keys as published."""

    def __init__(self, *, layers: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gconvs = nn.ModuleList(GraphTripleConv(width=width, hidden=hidden) for _ in range(layers))

    def forward(self, nodes: Tensor, edges: Tensor, graph: TokenGraph) -> tuple[Tensor, Tensor]:
        """Nodes (O, D) and edges (E, D) after all of them."""
        for conv in self.gconvs:
            nodes, edges = conv(nodes, edges, graph)
        return nodes, edges


class TripleConvEncoder(nn.Module):
    """The published encoder; its keys are those of the published checkpoint.

    Args:
        token_width: C.
        width: D.
        hidden: H.
        layers: convolutions after the first.

    Source:
        Li et al., "LAION-SG" (arXiv 2412.08580), section 4, and the released weights.
    """

    def __init__(self, *, token_width: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.graph_conv = GraphTripleConv(width=width, hidden=hidden)
        self.graph_net = GraphTripleConvNet(layers=layers, width=width, hidden=hidden)
        self.projection_mlp_1 = nn.Linear(token_width, width, bias=False)
        self.projection_mlp_2 = nn.Linear(width, token_width, bias=False)
        self.alpha_obj = nn.Parameter(torch.zeros(1))
        # in the published file, read by nothing
        self.register_buffer("logit_scale", torch.tensor(1 / 0.07).log())

    @property
    def gate(self) -> Tensor:
        """What is zero until the encoder acts."""
        return self.alpha_obj

    def features(self, hidden: Tensor, graph: TokenGraph) -> Tensor:
        """(F, C) what is added to the prompts, before the gate, of tokens (K, C)."""
        vectors = self.projection_mlp_1(hidden.index_select(0, graph.tokens))
        nodes, edges = vectors.index_select(0, graph.nodes), vectors.index_select(0, graph.edges)
        nodes, edges = self.graph_net(*self.graph_conv(nodes, edges, graph), graph)
        found = torch.cat([nodes, edges]).index_select(0, graph.source)
        return self.projection_mlp_2(functional.normalize(found, dim=-1))

    def forward(self, hidden: Tensor, graph: TokenGraph, prompt: Tensor) -> Tensor:
        """Prompt tokens (B, T, C) with the graph's added behind the gate, of tokens (K, C)."""
        added = (self.alpha_obj * self.features(hidden, graph)).to(prompt.dtype)
        return prompt.flatten(0, 1).index_add(0, graph.target, added).view_as(prompt)


def published_tensors(encoder: TripleConvEncoder) -> dict[str, Tensor]:
    """The encoder's tensors under the published names; they share memory with it."""
    return cast("dict[str, Tensor]", {name: tensor.data for name, tensor in encoder.state_dict(keep_vars=True).items()})
