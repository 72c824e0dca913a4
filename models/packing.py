"""Strings for a causal encoder without padding: several in a row, each common beginning once.

What a token says depends on what stands before it alone, so that strings in one row only have to be kept from seeing each
other, and those that begin alike share their beginning. Here are the layout of token ids and the record of what comes back; the
encoder is called in `models.text`.

Legend: M strings, R rows, T tokens of a row, K tokens of all strings end to end, C width of a token, P width of the projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the tokens of M strings lie.

    Attributes:
        ids: (R, T) int64 token ids, 0 where a row is not full.
        positions: (R, T) int64 place of a token in its string.
        mask: (R, 1, T, T) bool, True where a token sees another: itself and what stands before it in its string.
        places: (K,) int64 where each token lies in R * T, string after string.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    places: Tensor


class _Row:
    """A row as a tree of beginnings: a node is a token after what stands before it."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], int] = {}
        self.tokens: list[
            tuple[int, int, int]
        ] = []  # of each node: its token, the node before it (-1: none), its place

    def known(self, string: Sequence[int]) -> list[int]:
        """The nodes that a string begins with, as far as they are there."""
        path, node = [], -1
        for token in string:
            found = self.nodes.get((node, token))
            if found is None:
                break
            node = found
            path.append(node)
        return path

    def add(self, string: Sequence[int]) -> list[int]:
        """The nodes of a string, new ones put at the end of the row."""
        path = self.known(string)
        for place in range(len(path), len(string)):
            before = path[-1] if path else -1
            self.nodes[before, string[place]] = node = len(self.tokens)
            self.tokens.append((string[place], before, place))
            path.append(node)
        return path


def pack(strings: Sequence[Sequence[int]], *, length: int) -> Packing:
    """Lays strings into few rows, the longest first, each where most of its beginning lies of the rows with room for the rest.

    Args:
        strings: token ids of M strings, none longer than `length`.
        length: most tokens of a row.

    Returns:
        The layout, on the CPU; T is the length of the fullest row.
    """
    rows, paths = _laid(strings, length)
    if rows:  # the same number of rows, filled evenly: T, and with it what is computed for nothing, gets less
        even = max(max(map(len, strings)), -(-sum(len(row.tokens) for row in rows) // len(rows)))
        for tried in range(even, length, 2):
            evenly = _laid(strings, tried)
            if len(evenly[0]) == len(rows):
                rows, paths = evenly
                break
    longest = max((len(row.tokens) for row in rows), default=0)
    ids, positions = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
    mask = np.zeros((len(rows), 1, longest, longest), bool)
    mask[:, :, range(longest), range(longest)] = True
    for number, row in enumerate(rows):
        for node, (token, before, place) in enumerate(row.tokens):
            ids[number, node], positions[number, node] = token, place
            if before >= 0:
                mask[number, 0, node] |= mask[number, 0, before]
    places = [number * longest + node for number, path in paths for node in path]
    return Packing(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        mask=torch.from_numpy(mask),
        places=torch.tensor(places, dtype=torch.int64),
    )


def _laid(strings: Sequence[Sequence[int]], length: int) -> tuple[list[_Row], list[tuple[int, list[int]]]]:
    """The rows, and for each string its row and its nodes there."""
    rows: list[_Row] = []
    paths: dict[int, tuple[int, list[int]]] = {}
    for index in sorted(range(len(strings)), key=lambda each: -len(strings[each])):
        string = strings[index]
        known = [len(row.known(string)) for row in rows]
        fitting = [n for n, row in enumerate(rows) if len(row.tokens) + len(string) - known[n] <= length]
        number = max(fitting, key=known.__getitem__, default=len(rows))
        if number == len(rows):
            rows.append(_Row())
        paths[index] = number, rows[number].add(string)
    return rows, [paths[each] for each in range(len(strings))]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Distinct strings read as captions are, end to end.

    Attributes:
        hidden: (K, C) tokens at the layer that captions are read from.
        pooled: (M, P) pooled vectors, in the order of `spans`; None where captions have none.
        spans: string -> where its tokens begin and end in `hidden`, start and end token included.
        cut: string -> tokens that were beyond the encoder's length, for strings that were cut.
    """

    hidden: Tensor
    pooled: Tensor | None
    spans: Mapping[str, tuple[int, int]]
    cut: Mapping[str, int]

    @classmethod
    def nothing(cls) -> Tokens:
        """No string at all."""
        return cls(hidden=torch.empty(0, 0), pooled=None, spans={}, cut={})

    def to(self, dtype: torch.dtype) -> Tokens:
        """The same tokens in another precision."""
        return replace(
            self, hidden=self.hidden.to(dtype), pooled=None if self.pooled is None else self.pooled.to(dtype)
        )

    def inner(self, string: str) -> range:
        """Where the tokens of a string lie in `hidden`, start and end token left out."""
        begin, end = self.spans[string]
        return range(begin + 1, end - 1)

    def end(self, string: str) -> int:
        """Where the end token of a string lies in `hidden`; it has seen the whole string."""
        return self.spans[string][1] - 1

    def padded(self, strings: Sequence[str], *, length: int) -> tuple[Tensor, Tensor | None]:
        """B of the strings, each filled up with its own end token.

        Args:
            strings: B strings, repetitions welcome.
            length: T, tokens of each.

        Returns:
            Tokens (B, T, C) and pooled vectors (B, P).
        """
        rows = [[min(self.spans[each][0] + place, self.end(each)) for place in range(length)] for each in strings]
        index = torch.tensor(rows, dtype=torch.int64, device=self.hidden.device)
        if self.pooled is None:
            return self.hidden[index], None
        number = {string: place for place, string in enumerate(self.spans)}
        return self.hidden[index], self.pooled[torch.tensor([number[each] for each in strings], device=index.device)]
