"""What the regions of a batch say: their words, each distinct one once, and the token network that joins words and boxes.

A region's text is its objects' sentences, joined and encoded together as published, or each encoded on its own. The encoder is
causal, so a word's feature depends on what comes before it alone: regions whose text begins alike share those words, and a text
that another one begins with is not encoded again. Where regions lie is worked out in `levels`.

Legend: B pictures, R regions, K distinct tokens of the batch, T tokens of the longest region, F frequencies, D width of a token.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.conditioning.geometry import fourier
from models.text import PhraseFeatures

NOWHERE = (-1.0, -1.0, -1.0, -1.0)  # the box of words that belong to no object
SEPARATOR = ";"
Tokenise = Callable[[Sequence[str]], list[list[int]]]
Box = tuple[float, float, float, float]
Row = list[tuple[int, float]]  # tokens among the K, with their bias


class RegionTokens(nn.Module):
    """Text and box to region token: every word of an object is told where the object is. Keys as published.

    Args:
        text_width: width of a word's feature.
        width: D.
        hidden: width between the layers.
        frequencies: F.

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
        # stands in published files, where it fills regions that are not there and so reaches no output
        self.register_buffer("null_text_feature", torch.zeros(text_width + 8 * frequencies))

    def forward(self, text: Tensor, boxes: Tensor) -> Tensor:
        """Region tokens (..., D) of words (..., text width) and boxes (..., 4), -1 for words of no object."""
        where = fourier(boxes, self.frequencies)
        return self.linears(torch.cat([text, where.to(text.dtype)], dim=-1))


@dataclass(frozen=True, kw_only=True)
class RegionRows:
    """The tokens of each region.

    Attributes:
        tokens: (R, T) int64 among the K distinct ones; what a short row is filled with is closed by its bias.
        bias: (R, T) float32: (IoU - 1) x scale of the token's object, -inf for closed ones; no row is closed altogether.
    """

    tokens: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words of the regions of a batch before the token network.

    Attributes:
        features: (K, text width).
        boxes: (K, 4) xyxy in [0, 1], -1 for words that belong to no object.
        rows: which of them each region has.
        cut: tokens of regions that did not fit the text encoder.
    """

    features: Tensor
    boxes: Tensor
    rows: RegionRows
    cut: int


@dataclass(frozen=True, kw_only=True)
class RegionText:
    """A region in words.

    Attributes:
        texts: one of each of its objects, in their order; none for a background.
        boxes: one of each.
        iou: overlap of each with the region over the largest.
        scope: what its objects are told apart by, beside their order: words are shared within it.
        names: one of each object, the same in every region of the scope.
    """

    texts: Sequence[str]
    boxes: Sequence[Box]
    iou: Sequence[float]
    scope: int
    names: Sequence[int]


@dataclass(frozen=True)
class _Run:
    """Words `start` to `end` of a string, all of one object; `padded`: of the string as the encoder pads it."""

    string: str
    start: int
    end: int
    box: Box
    padded: bool = False


@dataclass
class _Pack:
    """Distinct runs of words, and where each begins among the K."""

    runs: list[_Run] = field(default_factory=list)
    first: dict[object, int] = field(default_factory=dict)
    count: int = 0

    def add(self, key: object, run: _Run) -> range:
        """The places of a run that `key` tells apart from all others."""
        if key not in self.first:
            self.first[key] = self.count
            self.runs.append(run)
            self.count += run.end - run.start
        return range(self.first[key], self.first[key] + run.end - run.start)


@dataclass(frozen=True, kw_only=True)
class RegionWriter:
    """Puts regions into words.

    Args:
        tokenise: token ids of strings with start and end token, however long.
        max_length: tokens that the encoder reads at most.
        overflow: "joined": sentences joined by "; " and encoded together, as published; what is beyond `max_length` is cut.
            "per_object": each encoded on its own.
        scale: factor on IoU - 1.
    """

    tokenise: Tokenise
    max_length: int
    overflow: str
    scale: float

    def __call__(
        self, regions: Sequence[RegionText], phrases: Callable[..., PhraseFeatures], device: torch.device
    ) -> Words:
        """The words of R regions; without any, those of one background, so that no axis is empty.

        Args:
            regions: of the whole batch.
            phrases: encodes strings, each distinct one once; with `masked=True` to the encoder's length.
            device: where everything is to lie.

        Returns:
            Their words.
        """
        regions = regions or [RegionText(texts=(), boxes=(), iou=(), scope=0, names=())]
        pack, rows = _Pack(), [[] for _ in regions]
        cut = self._joined(regions, pack, rows) if self.overflow == "joined" else self._per_object(regions, pack, rows)
        features, boxes = _gather(pack, phrases, device)
        return Words(features=features, boxes=boxes, rows=_table(rows, device), cut=cut)

    def _joined(self, regions: Sequence[RegionText], pack: _Pack, rows: list[Row]) -> int:
        """Fills the rows with words of joined texts; returns how many tokens were cut."""
        strings, ids = self._join(regions)
        separator = self.tokenise([SEPARATOR])[0][1]
        # longest first: a text that others begin with finds its words there
        for place in sorted(range(len(regions)), key=lambda place: -len(ids[place])):
            region, read = regions[place], self._read(ids[place])
            spans = _between(read, separator) if region.texts else []
            for (start, end), box, iou, name in zip(spans, region.boxes, region.iou, region.names, strict=False):
                key = (region.scope, name, tuple(read[:end]))
                found = pack.add(key, _Run(string=strings[place], start=start, end=end, box=box))
                rows[place] += [(token, (iou - 1) * self.scale) for token in found]
            if not rows[place]:
                rows[place] = self._closed(strings[place], pack)
        return sum(max(0, len(each) - self.max_length) for each in ids)

    def _join(self, regions: Sequence[RegionText]) -> tuple[list[str], list[list[int]]]:
        """The text of each region, with its token ids."""
        parts = [[_without_separator(text) for text in region.texts] for region in regions]
        strings = ["; ".join(each) for each in parts]
        ids, separator = self.tokenise(strings), self.tokenise([SEPARATOR])[0][1]
        for place, each in enumerate(parts):
            if ids[place].count(separator) != max(len(each) - 1, 0):
                # punctuation before the separator made one token with it, and objects would get each other's boxes
                strings[place] = " ; ".join(each)
                ids[place] = self.tokenise([strings[place]])[0]
        return strings, ids

    def _per_object(self, regions: Sequence[RegionText], pack: _Pack, rows: list[Row]) -> int:
        """Fills the rows with words of single texts; returns how many tokens were cut."""
        distinct = list({text: None for region in regions for text in region.texts})
        ids = dict(zip(distinct, self.tokenise(distinct) if distinct else [], strict=True))
        cut: dict[object, int] = {}
        for region, row in zip(regions, rows, strict=True):
            for text, box, iou, name in zip(region.texts, region.boxes, region.iou, region.names, strict=True):
                key = (region.scope, name)
                cut[key] = max(0, len(ids[text]) - self.max_length)
                found = pack.add(key, _Run(string=text, start=1, end=len(self._read(ids[text])) - 1, box=box))
                row += [(token, (iou - 1) * self.scale) for token in found]
            if not row:
                row += self._closed("", pack)
        return sum(cut.values())

    def _closed(self, string: str, pack: _Pack) -> Row:
        """A region without a word of an object: all of its padded text counts alike, as the background's does."""
        run = _Run(string=string, start=0, end=self.max_length, box=NOWHERE, padded=True)
        return [(token, 0.0) for token in pack.add(("padded", string), run)]

    def _read(self, ids: list[int]) -> list[int]:
        """What the encoder reads of token ids; the end token stays."""
        return ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]


def _without_separator(text: str) -> str:
    """A text that cannot be taken for several; the tokenizer composes characters, which makes a Greek question mark a ";"."""
    return unicodedata.normalize("NFC", text).replace(SEPARATOR, "")


def _between(ids: list[int], separator: int) -> list[tuple[int, int]]:
    """The spans of ids between start token, separators and end token."""
    borders = [0, *(place for place, each in enumerate(ids) if each == separator), len(ids) - 1]
    return [(start + 1, end) for start, end in pairwise(borders)]


def _gather(pack: _Pack, phrases: Callable[..., PhraseFeatures], device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (K, text width) and boxes (K, 4) of the words of all runs."""
    offsets: dict[tuple[str, bool], int] = {}
    features, begin = [], 0
    for padded in (False, True):
        strings = list({run.string: None for run in pack.runs if run.padded == padded})
        if not strings:
            continue
        found = phrases(strings, masked=True) if padded else phrases(strings)
        length = found.last_hidden.shape[1]
        offsets |= {(string, padded): begin + place * length for place, string in enumerate(strings)}
        features.append(found.last_hidden.to(device).flatten(0, 1))
        begin += len(strings) * length
    where = [offsets[run.string, run.padded] + position for run in pack.runs for position in range(run.start, run.end)]
    boxes = [run.box for run in pack.runs for _ in range(run.start, run.end)]
    chosen = torch.tensor(where, dtype=torch.int64, device=device)
    return torch.cat(features).index_select(0, chosen), torch.tensor(boxes, device=device)


def _table(rows: Sequence[Row], device: torch.device) -> RegionRows:
    """Rows of (token, bias) as two tensors."""
    longest = max(len(row) for row in rows)
    filled = [row + [(0, -math.inf)] * (longest - len(row)) for row in rows]
    tokens = torch.tensor([[token for token, _ in row] for row in filled], dtype=torch.int64)
    bias = torch.tensor([[value for _, value in row] for row in filled], dtype=torch.float32)
    return RegionRows(tokens=tokens.to(device), bias=bias.to(device))
