"""A graph encoder of our own: a transformer over objects and relations that the prompt's tokens read by cross-attention.

An object is one node, however many relations name it, and so is a relation; there may be any number of both. What is added to a
prompt token is found by the token itself, so that words meet their objects wherever they stand (docs/decisions/0008).

Legend: B scenes, N nodes of the largest scene, T prompt tokens, C width of a prompt token, D width of a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from models.packing import Tokens
    from scenes import SceneBatch

ROLES = 3
"""What a head may look at: all nodes of the scene, what a relation has as subject, what it has as object."""


@dataclass(frozen=True, kw_only=True)
class NodeGraph:
    """B scenes as padded nodes: objects first, then relations. A scene without any has one closed node.

    Attributes:
        tokens: (B, N) int64 where the end token of each node's string lies in `Tokens.hidden`; 0 for padding.
        is_relation: (B, N) bool.
        valid: (B, N) bool.
        mask: (B, ROLES, N, N) bool, True where a node sees another in that role; every node sees itself.
    """

    tokens: Tensor
    is_relation: Tensor
    valid: Tensor
    mask: Tensor


def node_graph(scenes: SceneBatch, tokens: Tokens) -> NodeGraph:
    """The graph of B scenes, of what was read of `node_strings`, on the device of the tokens."""
    counts = [len(scene.objects) + len(scene.relations) for scene in scenes.scenes]
    shape = len(scenes), max([1, *counts])
    places, is_relation = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    valid = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
    rows: list[tuple[int, int, int, int]] = []  # scene, role, and two nodes that see each other
    for number, scene in enumerate(scenes.scenes):
        strings = [item.phrase for item in scene.objects] + [relation.predicate for relation in scene.relations]
        if strings:
            places[number, : len(strings)] = torch.tensor([tokens.end(string) for string in strings])
            is_relation[number, len(scene.objects) : len(strings)] = True
        for node, relation in enumerate(scene.relations, start=len(scene.objects)):
            rows += [(number, 1, node, relation.subject), (number, 2, node, relation.object)]
    mask = torch.zeros(shape[0], ROLES, shape[1], shape[1], dtype=torch.bool)
    mask[:, 0] = valid[:, :, None] & valid[:, None]
    mask[:, :, range(shape[1]), range(shape[1])] = True
    if rows:
        scene, role, one, other = torch.tensor(rows).unbind(dim=1)
        mask[scene, role, one, other] = mask[scene, role, other, one] = True
    device = tokens.hidden.device
    return NodeGraph(
        tokens=places.to(device), is_relation=is_relation.to(device), valid=valid.to(device), mask=mask.to(device)
    )


def node_strings(scenes: SceneBatch) -> list[str]:
    """Everything whose tokens `node_graph` takes: the phrases of all objects, and all predicates."""
    return [
        string
        for scene in scenes.scenes
        for string in (*(item.phrase for item in scene.objects), *(relation.predicate for relation in scene.relations))
    ]


class _Attention(nn.Module):
    """Attention of some tokens to others, both normed.

    Args:
        width: of the tokens that ask.
        source: width of those that are asked.
        inner: width of all heads.
        heads: their number.
    """

    def __init__(self, *, width: int, source: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_source = nn.LayerNorm(width), nn.LayerNorm(source)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(source, inner, bias=False)
        self.to_v = nn.Linear(source, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, asking: Tensor, asked: Tensor, mask: Tensor) -> Tensor:
        """(B, L, width) of tokens (B, L, width) and (B, N, source), where mask (B, heads or 1, L or 1, N) is True."""
        normed = self.norm_source(asked)
        query, key, value = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states in (self.to_q(self.norm(asking)), self.to_k(normed), self.to_v(normed))
        )
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(found.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Masked attention among the nodes, then two linear layers; both residual."""

    def __init__(self, *, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = _Attention(width=width, source=width, inner=width, heads=heads)
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        nodes = nodes + self.attention(nodes, nodes, mask)
        return nodes + self.net(nodes)


class TransformerEncoder(nn.Module):
    """Objects and relations attend to each other by their roles, prompt tokens attend to them; adds nothing at first.

    Args:
        token_width: C.
        width: D.
        hidden: width between the linear layers of a block.
        layers: blocks.
        heads: heads of every attention; each looks at one role, in turn.

    Raises:
        ValueError: heads that do not divide the width, or fewer than there are roles.
    """

    def __init__(self, *, token_width: int, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        if heads < ROLES or width % heads:
            raise ValueError(
                f"conditioning.scene_graph.heads: {heads} heads for width={width}; take at least {ROLES} that divide it"
            )
        self.to_object, self.to_relation = nn.Linear(token_width, width), nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(_Block(width=width, hidden=hidden, heads=heads) for _ in range(layers))
        self.reader = _Attention(width=token_width, source=width, inner=width, heads=heads)
        nn.init.zeros_(self.reader.to_out.weight)
        nn.init.zeros_(self.reader.to_out.bias)
        self.roles = [head % ROLES for head in range(heads)]

    @property
    def gate(self) -> Tensor:
        """What is zero until the encoder acts."""
        return self.reader.to_out.weight

    def forward(self, hidden: Tensor, graph: NodeGraph, prompt: Tensor) -> Tensor:
        """Prompt tokens (B, T, C) with what each has found in its graph, of tokens (K, C).

        Prompts of scenes without a node are unchanged.
        """
        own = hidden[graph.tokens]
        nodes = torch.where(graph.is_relation[..., None], self.to_relation(own), self.to_object(own))
        mask = graph.mask[:, self.roles]
        for block in self.blocks:
            nodes = block(nodes, mask)
        has_nodes = graph.valid.any(dim=1)[:, None, None]
        open_nodes = (graph.valid | ~has_nodes[:, 0])[:, None, None]  # a null scene opens all: no row may be empty
        found = self.reader(prompt, nodes, open_nodes).to(prompt.dtype)
        return torch.where(has_nodes, prompt + found, prompt)
