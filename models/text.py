"""Text in, features out: CLIP tokenizers and text encoders, and the two records that they produce.

`TextTower` is one tokenizer with one encoder, `TextTowers` one or several of them read side by side (SDXL has two). What
an adapter does with the features, and how captions are dropped, lives elsewhere.

Legend: M strings asked for, B captions, T tokens, C width of a token (summed over towers), P width of the projection.
"""

import unicodedata
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.packing import Tokens, pack

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


@dataclass(frozen=True, kw_only=True)
class PhraseFeatures:
    """What the text encoder(s) say about M strings, in the order they were asked for.

    With several towers the token features are concatenated along C, `pooled` is the **first** tower's and `projected`
    that of the last tower that has a projection. So SDXL's 2048-wide pooled text (CLIP-L's pooled output, then bigG's text
    embedding) is `torch.cat([features.pooled, features.projected], dim=-1)`; everything else is under `towers`.

    Attributes:
        last_hidden: (M, T, C) after the final layer norm.
        penultimate_hidden: (M, T, C) output of the last layer but one, not normalised.
        pooled: (M, C of tower 1) `last_hidden` at the end token (CLIP's pooler output).
        projected: (M, P) text projection of the pooled vector; None where no encoder has one.
        lengths: (M,) int64, tokens of each string with the start and the end token.
        towers: the features of each tower by itself, in order; empty for a single tower.
    """

    last_hidden: Tensor
    penultimate_hidden: Tensor
    pooled: Tensor
    projected: Tensor | None
    lengths: Tensor
    towers: tuple["PhraseFeatures", ...] = ()

    def to(self, dtype: torch.dtype) -> "PhraseFeatures":
        """The same features in another precision."""
        return PhraseFeatures(
            last_hidden=self.last_hidden.to(dtype),
            penultimate_hidden=self.penultimate_hidden.to(dtype),
            pooled=self.pooled.to(dtype),
            projected=None if self.projected is None else self.projected.to(dtype),
            lengths=self.lengths,
            towers=tuple(tower.to(dtype) for tower in self.towers),
        )

    @property
    def mask(self) -> Tensor:
        """(M, T) bool, True on the string's own tokens (start and end included), False on padding."""
        return torch.arange(self.last_hidden.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def __getitem__(self, index: Tensor | slice) -> "PhraseFeatures":
        return PhraseFeatures(
            last_hidden=self.last_hidden[index],
            penultimate_hidden=self.penultimate_hidden[index],
            pooled=self.pooled[index],
            projected=None if self.projected is None else self.projected[index],
            lengths=self.lengths[index],
            towers=tuple(tower[index] for tower in self.towers),
        )


@dataclass(frozen=True)
class Prompt:
    """The caption as the UNet takes it.

    Attributes:
        tokens: (B, T, C) caption tokens, padded to the tokenizer's length.
        pooled: (B, P) pooled caption vector, None for a backbone that takes none.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Prompt":
        """The same prompt in another precision."""
        return Prompt(self.tokens.to(dtype), None if self.pooled is None else self.pooled.to(dtype))

    def blanked(self, kept: Tensor) -> "Prompt":
        """The same with zero tokens and a zero pooled vector where `kept` (B,) bool is False."""
        rows = kept.to(self.tokens.device)
        pooled = None if self.pooled is None else self.pooled * rows[:, None]
        return Prompt(self.tokens * rows[:, None, None], pooled)


def word_tokenizer(words: Sequence[str], *, max_length: int) -> CLIPTokenizer:
    """Builds a CLIP tokenizer in which each given word is one token and any other text falls back to bytes.

    Every word is merged from its end: "red" by (d</w> with e), then (ed</w> with r). All merges thus pair one character with
    an end of a word, so at most one can apply at any time and words never get in each other's way, whatever their order.

    Args:
        words: words to know; their order fixes the token ids, repetitions count once.
        max_length: longest sequence with start and end token; longer text is for the caller to cut.

    Returns:
        A tokenizer whose ids run through bytes, bytes that end a word, merges of the words, and start and end token.

    Raises:
        ValueError: a word that CLIP's rules split before any merge ("t-shirt", "42", "two words").
    """
    base = _byte_characters()
    vocabulary = [*base, *(character + END_OF_WORD for character in base)]
    known, merges = set(vocabulary), []
    byte_to_character = dict(zip(_byte_order(), base, strict=True))
    for word in words:
        characters = [byte_to_character[b] for b in unicodedata.normalize("NFC", word).lower().encode()]
        for start in range(len(characters) - 2, -1, -1):
            ending = "".join(characters[start + 1 :]) + END_OF_WORD
            if characters[start] + ending not in known:
                known.add(characters[start] + ending)
                vocabulary.append(characters[start] + ending)
                merges.append((characters[start], ending))
    vocabulary += [START, END]  # CLIP takes the largest id as the end of the text
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_length)
    for word in words:
        if len(tokenizer(word)["input_ids"]) != 3:
            raise ValueError(f"words: {word!r} cannot be one token in CLIP's rules; give it as separate words")
    return tokenizer


def _byte_order() -> list[int]:
    """The 256 bytes in the order of CLIP's vocabulary: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _byte_characters() -> list[str]:
    """The character that stands for each byte of `_byte_order` in a byte-level vocabulary."""
    order, spare = _byte_order(), 256
    characters = []
    for position, byte in enumerate(order):
        printable = position < 188
        characters.append(chr(byte) if printable else chr(spare))
        spare += not printable
    return characters


class TextTower(nn.Module):
    """One CLIP tokenizer with one CLIP text encoder.

    No attention mask is given unless asked for, as in the published pipelines: the encoder is causal, so tokens after the
    end token cannot reach those before it, and a trimmed string gives the features of a padded one.

    Args:
        tokenizer: its `model_max_length` is the length of a padded caption.
        encoder: the transformer, with or without a text projection.

    Raises:
        ValueError: a tokenizer that does not fit the encoder.
    """

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel | CLIPTextModelWithProjection) -> None:
        super().__init__()
        positions = encoder.config.max_position_embeddings
        if tokenizer.model_max_length > positions:
            raise ValueError(
                f"tokenizer.model_max_length: {tokenizer.model_max_length} is more than the text encoder's {positions} "
                f"positions; set it to at most {positions}"
            )
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"text_encoder.vocab_size: {encoder.config.vocab_size} is less than the tokenizer's {len(tokenizer)} "
                "tokens; take the tokenizer that belongs to this encoder"
            )
        self.tokenizer = tokenizer
        self.encoder = encoder

    @property
    def width(self) -> int:
        """Width of a token feature."""
        return self.encoder.config.hidden_size

    @property
    def projection_width(self) -> int | None:
        """Width of the projected vector, None without a projection."""
        return self.encoder.config.projection_dim if hasattr(self.encoder, "text_projection") else None

    @property
    def max_length(self) -> int:
        """Longest sequence of tokens, start and end included."""
        return self.tokenizer.model_max_length

    def tokenise(self, strings: Sequence[str]) -> list[list[int]]:
        """Token ids of each string with start and end token, however long."""
        return self.tokenizer(list(strings), truncation=False, verbose=False)["input_ids"]

    def encode(self, rows: Sequence[list[int]], *, length: int, masked: bool = False) -> PhraseFeatures:
        """Features of rows of token ids, each padded or cut to `length`; the end token stays. `masked` hides the padding."""
        device = cast(nn.Embedding, self.encoder.get_input_embeddings()).weight.device
        padding, end = cast(int, self.tokenizer.pad_token_id), cast(int, self.tokenizer.eos_token_id)
        cut = [row if len(row) <= length else [*row[: length - 1], end] for row in rows]
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in cut], device=device)
        lengths = torch.tensor([len(row) for row in cut], device=device)
        mask = (torch.arange(length, device=device) < lengths[:, None]).long() if masked else None
        outputs = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        # Found by the tokenizer's own end token: CLIPTextModel looks for config.eos_token_id, and for the largest id where
        # that is the legacy 2; both can disagree with the tokenizer.
        at_end = ids.eq(end).int().argmax(dim=-1)
        pooled = outputs.last_hidden_state[torch.arange(len(rows), device=device), at_end]
        projection = getattr(self.encoder, "text_projection", None)
        return PhraseFeatures(
            last_hidden=outputs.last_hidden_state,
            penultimate_hidden=outputs.hidden_states[-2],
            pooled=pooled,
            projected=None if projection is None else projection(pooled),
            lengths=lengths,
        )

    def encode_packed(self, rows: Sequence[list[int]]) -> list[PhraseFeatures]:
        """The same of each row of token ids by itself, all in one call and without padding; long rows are cut."""
        device = cast(nn.Embedding, self.encoder.get_input_embeddings()).weight.device
        end = cast(int, self.tokenizer.eos_token_id)
        cut = [row if len(row) <= self.max_length else [*row[: self.max_length - 1], end] for row in rows]
        packing = pack(cut, length=self.max_length)
        closed = torch.zeros(packing.mask.shape, dtype=self.encoder.dtype).masked_fill(~packing.mask, -torch.inf)
        outputs = self.encoder(
            input_ids=packing.ids.to(device),
            position_ids=packing.positions.to(device),
            attention_mask=closed.to(device),  # four axes: transformers takes it as it is
            output_hidden_states=True,
        )
        places = packing.places.to(device)
        last, penultimate = (
            states.flatten(0, 1).index_select(0, places)
            for states in (outputs.last_hidden_state, outputs.hidden_states[-2])
        )
        lengths = torch.tensor([len(row) for row in cut])
        ends = lengths.cumsum(0)
        pooled = last.index_select(0, (ends - 1).to(device))
        projection = getattr(self.encoder, "text_projection", None)
        projected = None if projection is None else projection(pooled)
        return [
            PhraseFeatures(
                last_hidden=last[None, begin:stop],
                penultimate_hidden=penultimate[None, begin:stop],
                pooled=pooled[number : number + 1],
                projected=None if projected is None else projected[number : number + 1],
                lengths=lengths[number : number + 1],
            )
            for number, (begin, stop) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False))
        ]


class TextTowers(nn.Module):
    """One or several towers that read the same text side by side.

    Args:
        towers: towers in the order in which their features are concatenated.
        caption_layer: "last" (SD) or "penultimate" (SDXL): the layer that captions are read from.
        caption_pooled: whether a `Prompt` carries the projected vector (SDXL: bigG's).
        phrase_cache: tokens of phrases whose features are kept, the longest unused go first; 0 keeps none. A kept
            phrase was encoded beside others than now, so that on some devices its last bits depend on what came
            before: runs that have to repeat bit for bit keep none. An encoder that trains is never cached.

    Attributes:
        truncated: how many of the strings asked for were longer than `max_length` so far, and were cut.

    Raises:
        ValueError: no tower, towers of different lengths, or a pooled caption without any text projection.
    """

    def __init__(
        self,
        towers: Sequence[TextTower],
        *,
        caption_layer: Literal["last", "penultimate"] = "last",
        caption_pooled: bool = False,
        phrase_cache: int = 0,
    ) -> None:
        super().__init__()
        if len({tower.max_length for tower in towers}) != 1:
            lengths = [tower.max_length for tower in towers]
            raise ValueError(f"towers: lengths {lengths} differ; give one or more towers of one model_max_length")
        if caption_layer not in ("last", "penultimate"):
            raise ValueError(f"caption_layer: {caption_layer!r} is unknown; take last or penultimate")
        if caption_pooled and not any(tower.projection_width for tower in towers):
            raise ValueError("caption_pooled: true needs a text encoder with a projection; take caption_pooled=false")
        self.towers = nn.ModuleList(towers)
        self.caption_layer = caption_layer
        self.caption_pooled = caption_pooled
        self.truncated = 0
        self._long: dict[str, int] = {}  # of the last strings encoded, those that were cut: tokens beyond
        self._cache = PhraseCache(phrase_cache)
        self.register_load_state_dict_post_hook(lambda *_: self._cache.clear())

    @property
    def width(self) -> int:
        """Width of a token feature, summed over the towers."""
        return sum(tower.width for tower in self.each)

    @property
    def each(self) -> list[TextTower]:
        """The towers in order, by their own type: `nn.ModuleList` knows its items as modules only."""
        return cast(list[TextTower], list(self.towers))

    @property
    def max_length(self) -> int:
        """Tokens of a padded caption."""
        return self.each[0].max_length

    def encode_phrases(self, phrases: Sequence[str], *, padded: bool = False, masked: bool = False) -> PhraseFeatures:
        """Features of M strings; each distinct string runs through the encoder(s) once.

        Args:
            phrases: M strings, repetitions welcome; M may be 0.
            padded: pad to the tokenizer's length (T = `max_length`) in place of trimming to the longest string.
            masked: pad so, and let no token read the padding: what the padding itself says is then another, which the
                rich-context system's backgrounds are made of.

        Returns:
            The features of the M strings, repetitions included, in the order of `phrases`.
        """
        asked = Counter(phrases) or Counter([""])
        padded = padded or masked
        if padded or not self._caches:
            parts = self._encode(asked, padded=padded, masked=masked)
        else:
            missing = Counter({phrase: count for phrase, count in asked.items() if phrase not in self._cache})
            self.truncated += sum(asked[phrase] for phrase in asked.keys() & self._cache.cut.keys())
            if missing:
                self._cache.keep(list(missing), self._encode(missing, padded=False))
                self._cache.cut |= self._long
            parts = self._cache.take(list(asked))
        joined = _join(parts)
        place = {phrase: index for index, phrase in enumerate(asked)}
        return joined[torch.tensor([place[p] for p in phrases], dtype=torch.int64, device=joined.lengths.device)]

    def _encode(self, asked: Counter[str], *, padded: bool, masked: bool = False) -> tuple[PhraseFeatures, ...]:
        """Each tower's features of the distinct strings, in their order; `asked` also says how often each is wanted."""
        tokenised, longest = self._tokenise(asked)
        length = self.max_length if padded else min(longest, self.max_length)
        return tuple(
            tower.encode(rows, length=length, masked=masked) for tower, rows in zip(self.each, tokenised, strict=True)
        )

    @property
    def _caches(self) -> bool:
        """Whether features are kept: an encoder that trains changes them."""
        return bool(self._cache.tokens) and not any(parameter.requires_grad for parameter in self.parameters())

    def _tokenise(self, asked: Counter[str]) -> tuple[list[list[list[int]]], int]:
        """Each tower's token ids of the distinct strings, and the longest; strings that will be cut are counted."""
        tokenised = [tower.tokenise(list(asked)) for tower in self.each]
        lengths = [max(map(len, rows)) for rows in zip(*tokenised, strict=True)]
        self._long = {
            phrase: n - self.max_length for phrase, n in zip(asked, lengths, strict=True) if n > self.max_length
        }
        self._count_long({phrase: asked[phrase] for phrase in self._long})
        return tokenised, max(lengths)

    def read(self, strings: Sequence[str], *, once: Collection[str] = ()) -> Tokens:
        """Strings as captions are read, but without padding: every distinct one in the same call of the encoder(s).

        Args:
            strings: repetitions welcome.
            once: those of them that are not worth keeping in the cache.

        Returns:
            Their tokens at the layer that captions are read from, end to end in the order of their first appearance.

        Raises:
            ValueError: tokenizers that cut a string into different numbers of tokens.
        """
        asked = Counter(strings)
        if not asked:
            return Tokens.nothing()
        caches = self._caches
        missing = Counter({each: count for each, count in asked.items() if not (caches and each in self._cache)})
        fresh: dict[str, tuple[PhraseFeatures, ...]] = {}
        cut = {each: self._cache.cut[each] for each in asked.keys() - missing.keys() if each in self._cache.cut}
        self.truncated += sum(asked[each] for each in cut)
        if missing:
            tokenised, _ = self._tokenise(missing)
            packed = [tower.encode_packed(rows) for tower, rows in zip(self.each, tokenised, strict=True)]
            fresh = dict(zip(missing, zip(*packed, strict=True), strict=True))
            cut |= self._long
        rows = {each: fresh[each] if each in fresh else self._cache.row(each) for each in asked}
        if caches:
            kept = [each for each in fresh if each not in once]
            for each in kept:
                self._cache.put(each, fresh[each])
            self._cache.cut |= {each: self._long[each] for each in kept if each in self._long}
            self._cache.trim(spare=len(kept))
        return self._laid_out(rows, cut)

    def _laid_out(self, rows: dict[str, tuple[PhraseFeatures, ...]], cut: dict[str, int]) -> Tokens:
        """Features of single strings as one record."""
        spans, begin = {}, 0
        for string, towers in rows.items():
            lengths = {tower.last_hidden.shape[1] for tower in towers}
            if len(lengths) != 1:
                raise ValueError(
                    f"text: {string[:60]!r} has {' and '.join(map(str, lengths))} tokens in the tokenizers of this backbone; "
                    "take text encoders with one vocabulary"
                )
            spans[string] = begin, begin + lengths.pop()
            begin = spans[string][1]
        layer = "last_hidden" if self.caption_layer == "last" else "penultimate_hidden"
        each = list(zip(*rows.values(), strict=True))
        hidden = torch.cat([torch.cat([getattr(row, layer)[0] for row in tower]) for tower in each], dim=-1)
        projected = [row.projected for tower in each for row in tower if row.projected is not None]
        pooled = torch.cat(projected[-len(rows) :]) if self.caption_pooled else None
        return Tokens(hidden=hidden, pooled=pooled, spans=spans, cut=cut)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TextTowers":
        """As `nn.Module._apply`; what is kept belongs to the weights as they were."""
        self._cache.clear()
        return super()._apply(fn, recurse)

    def _count_long(self, long: dict[str, int]) -> None:
        """Counts strings that are cut, and says so the first time."""
        if long and not self.truncated:
            warnings.warn(
                f"text: {next(iter(long))[:60]!r} is longer than {self.max_length} tokens and was cut; further ones are "
                "only counted (TextTowers.truncated)",
                stacklevel=3,
            )
        self.truncated += sum(long.values())

    def encode_captions(self, captions: Sequence[str]) -> Prompt:
        """The captions as the UNet takes them, padded to the tokenizer's length as in the published pipelines."""
        features = self.encode_phrases(captions, padded=True)
        last = self.caption_layer == "last"
        tokens = features.last_hidden if last else features.penultimate_hidden
        return Prompt(tokens, features.projected if self.caption_pooled else None)


class PhraseCache:
    """Features of single phrases, each trimmed to its own length, the longest unused forgotten first.

    Args:
        tokens: how many tokens may be kept; one call may need more and then keeps them until the next.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.cut: dict[str, int] = {}  # kept phrases that were longer than the encoder reads: tokens beyond
        self._rows: OrderedDict[str, tuple[PhraseFeatures, ...]] = OrderedDict()
        self._held = 0

    def __contains__(self, phrase: str) -> bool:
        return phrase in self._rows

    def __len__(self) -> int:
        """How many phrases are kept."""
        return len(self._rows)

    def clear(self) -> None:
        """Forgets everything."""
        self._rows.clear()
        self.cut.clear()
        self._held = 0

    def keep(self, phrases: Sequence[str], towers: Sequence[PhraseFeatures]) -> None:
        """Keeps each tower's features of M distinct phrases."""
        lengths = [tower.lengths.tolist() for tower in towers]
        for row, phrase in enumerate(phrases):
            own = [each[row] for each in lengths]
            self._add(phrase, tuple(_row(tower, row, length) for tower, length in zip(towers, own, strict=True)))

    def put(self, phrase: str, towers: Sequence[PhraseFeatures]) -> None:
        """Keeps each tower's features of a single phrase."""
        self._add(phrase, tuple(_row(tower, 0, tower.last_hidden.shape[1]) for tower in towers))

    def row(self, phrase: str) -> tuple[PhraseFeatures, ...]:
        """Each tower's features of a kept phrase, which is now the last that was used."""
        self._rows.move_to_end(phrase)
        return self._rows[phrase]

    def _add(self, phrase: str, row: tuple[PhraseFeatures, ...]) -> None:
        self._rows[phrase] = row
        self._held += max(tower.last_hidden.shape[1] for tower in row)

    def trim(self, *, spare: int) -> None:
        """Forgets the longest unused while there are too many tokens, but not the last `spare` phrases."""
        while self._held > self.tokens and len(self._rows) > spare:
            phrase, gone = self._rows.popitem(last=False)
            self.cut.pop(phrase, None)
            self._held -= max(tower.last_hidden.shape[1] for tower in gone)

    def take(self, phrases: Sequence[str]) -> tuple[PhraseFeatures, ...]:
        """Each tower's features of kept phrases, padded with zeros to the longest; then forgets what is too much."""
        rows = [self.row(phrase) for phrase in phrases]
        length = max(tower.last_hidden.shape[1] for row in rows for tower in row)
        self.trim(spare=len(phrases))
        return tuple(_stack(each, length) for each in zip(*rows, strict=True))


def _row(tower: PhraseFeatures, row: int, length: int) -> PhraseFeatures:
    """One phrase without its padding, in memory of its own."""
    one = slice(row, row + 1)
    return PhraseFeatures(
        last_hidden=tower.last_hidden[one, :length].clone(),
        penultimate_hidden=tower.penultimate_hidden[one, :length].clone(),
        pooled=tower.pooled[one].clone(),
        projected=None if tower.projected is None else tower.projected[one].clone(),
        lengths=tower.lengths[one].clone(),
    )


def _stack(rows: Sequence[PhraseFeatures], length: int) -> PhraseFeatures:
    """Single phrases of one tower as M, padded with zeros to `length` tokens."""
    projected = [row.projected for row in rows if row.projected is not None]
    return PhraseFeatures(
        last_hidden=torch.cat(
            [functional.pad(r.last_hidden, (0, 0, 0, length - r.last_hidden.shape[1])) for r in rows]
        ),
        penultimate_hidden=torch.cat(
            [functional.pad(r.penultimate_hidden, (0, 0, 0, length - r.penultimate_hidden.shape[1])) for r in rows]
        ),
        pooled=torch.cat([row.pooled for row in rows]),
        projected=torch.cat(projected) if projected else None,
        lengths=torch.cat([row.lengths for row in rows]),
    )


def _join(parts: tuple[PhraseFeatures, ...]) -> PhraseFeatures:
    """The features of several towers as one; a single tower is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    projected = [part.projected for part in parts if part.projected is not None]
    return PhraseFeatures(
        last_hidden=torch.cat([part.last_hidden for part in parts], dim=-1),
        penultimate_hidden=torch.cat([part.penultimate_hidden for part in parts], dim=-1),
        pooled=parts[0].pooled,
        projected=projected[-1] if projected else None,
        lengths=torch.stack([part.lengths for part in parts]).amax(dim=0),
        towers=parts,
    )
