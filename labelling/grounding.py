"""Open detectors: GroundingDINO and OWLv2 through transformers, which find what they are asked for in words.

A box comes back under the very text that was asked for, whatever the tokenizer made of it. Detectors with a list of classes
of their own are in ``detectors.py``.

Legend: Q queries of a model, T tokens of a text.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labelling.opening import Pretrained, as_pillow, batches
from labelling.parts import Detections, Detector

LABEL_FORMS = ("asked", "tokens", "all_tokens")
SEPARATORS = (".", ",")
SMALLEST = 1e-6  # of a side, below which a clipped box has no area
_ENDS = re.compile(r"[.?]+")
_COMMAS = re.compile(r"[.?,]+")


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One call's worth of texts for one picture.

    Attributes:
        picture: Which picture.
        texts: What is asked for, in the model's words.
        asked: Which of the asked tags each of them belongs to.
    """

    picture: int
    texts: tuple[str, ...]
    asked: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Boxes (n, 4) xyxy in [0, 1], scores (n,) and n labels that one question gave."""

    boxes: Tensor
    scores: Tensor
    labels: list[str]


class _OpenDetector(Pretrained, Detector):
    """Base of the open detectors: questions, batches of pictures of one size, suppression of repetitions.

    Pictures of one size share a batch, so that none is padded and what is found does not depend on the others.

    Args:
        model: As in `Pretrained`.
        revision: As in `Pretrained`.
        box_threshold: Boxes of this score or less go.
        nms: Boxes that overlap a surer one by more than this IoU go; null keeps all.
        nms_across: Whether boxes under different tags suppress one another too, as the published labelling does.
        dtype: As in `Pretrained`.
        batch_size: Pictures at once.

    Raises:
        ValueError: A number is out of its range.
    """

    kind = "detector"

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        box_threshold: float = 0.25,
        nms: float | None = 0.5,
        nms_across: bool = False,
        dtype: str = "float32",
        batch_size: int = 4,
    ) -> None:
        super().__init__(model=model, revision=revision, dtype=dtype, batch_size=batch_size)
        for name, value in {"box_threshold": box_threshold, "nms": nms}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"detector.{name}={value}: give a number from 0 to 1")
        self.box_threshold, self.nms, self.nms_across = box_threshold, nms, nms_across
        self._processor: Any = None

    def settings(self) -> dict[str, Any]:
        """Model and thresholds."""
        return {
            **super().settings(),
            "box_threshold": self.box_threshold,
            "nms": self.nms,
            "nms_across": self.nms_across,
        }

    def _open(self) -> torch.nn.Module:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self._processor = self.opened(AutoProcessor)
        return self.opened_model(AutoModelForZeroShotObjectDetection)

    @abstractmethod
    def questions(self, picture: int, asked: Sequence[str]) -> list[_Question]:
        """Return the questions about a picture, in as many calls as the model's length of text needs."""

    @abstractmethod
    def answers(
        self, pictures: Sequence[np.ndarray], questions: Sequence[_Question], asked: Sequence[Sequence[str]]
    ) -> list[_Found]:
        """Find objects in pictures of one size, each with its question; boxes are clipped later."""

    @torch.inference_mode()
    def __call__(
        self, pictures: Sequence[np.ndarray], asked: Sequence[Sequence[str]] | None = None
    ) -> list[Detections]:
        """As in `Detector`."""
        if asked is None or len(asked) != len(pictures):
            given = "nothing" if asked is None else f"{len(asked)} lists for {len(pictures)} pictures"
            raise ValueError(f"detector: {type(self).__name__} was asked for {given}; choose a tagger")
        _ = self.model  # opened before its tokenizer is asked
        of_size: dict[tuple[int, ...], list[_Question]] = defaultdict(list)
        for place, (picture, tags) in enumerate(zip(pictures, asked, strict=True)):
            if not any(_plain(tag) for tag in tags):
                raise ValueError(f"detector: picture {place}: asked for nothing; give it tags or leave it out")
            of_size[picture.shape] += self.questions(place, tags)
        found: dict[int, list[_Found]] = defaultdict(list)
        for questions in of_size.values():
            for batch in batches(questions, self.batch_size):
                answers = self.answers([pictures[each.picture] for each in batch], batch, asked)
                for question, answer in zip(batch, answers, strict=True):
                    found[question.picture].append(answer)
        return [self._kept(found[place]) for place in range(len(pictures))]

    def _kept(self, found: Sequence[_Found]) -> Detections:
        """Return the boxes of all questions of a picture without repetitions, the surest first."""
        from torchvision.ops import batched_nms, nms

        boxes = torch.cat([each.boxes for each in found]).float().cpu().clamp(0, 1)
        scores = torch.cat([each.scores for each in found]).float().cpu()
        labels = [label for each in found for label in each.labels]
        sides = boxes[:, 2:] - boxes[:, :2]
        solid = (sides > SMALLEST).all(-1).nonzero()[:, 0]
        order = solid[scores[solid].argsort(descending=True, stable=True)]
        if self.nms is not None:
            kinds = {label: number for number, label in enumerate(dict.fromkeys(labels))}
            if self.nms_across:
                order = order[nms(boxes[order], scores[order], self.nms)]
            else:
                numbers = torch.tensor([kinds[labels[place]] for place in order.tolist()], dtype=torch.int64)
                order = order[batched_nms(boxes[order], scores[order], numbers, self.nms)]
        return Detections(
            boxes=boxes[order].numpy(),
            scores=scores[order].clamp(0, 1).numpy(),
            labels=tuple(labels[place] for place in order.tolist()),
        )


class GroundingDino(_OpenDetector):
    """GroundingDINO, and MM-GroundingDINO: one text with all that is asked for, a separator between.

    A box belongs to what its surest token stands in. More than the model's length of text is asked in several calls.

    Args:
        text_threshold: A box goes if no token of what it belongs to is surer than this.
        labels: "asked": the asked text as it was given; "tokens": of that text, the words that are surer than
            `text_threshold`, as IGLIGEN's phrases were made of whole captions; "all_tokens": such words of whatever was asked
            in the call, as the rich-context chain joins them.
        separator: Between what is asked: "." keeps the texts from attending to one another, "," does not.
        final_stop: Whether a full stop ends the text.
        short_side: Px to which the short side of pictures is brought; null for the model's own.
        **settings: As in `_OpenDetector`.

    Raises:
        ValueError: A number is out of its range, or the form of labels unknown.
    """

    def __init__(
        self,
        *,
        text_threshold: float = 0.2,
        labels: str = "asked",
        separator: str = ".",
        final_stop: bool = True,
        short_side: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 <= text_threshold <= 1:
            raise ValueError(f"detector.text_threshold={text_threshold}: give a number from 0 to 1")
        if labels not in LABEL_FORMS:
            raise ValueError(f"detector.labels={labels}: must be one of {', '.join(LABEL_FORMS)}")
        if separator not in SEPARATORS:
            raise ValueError(f"detector.separator={separator!r}: must be one of {' '.join(SEPARATORS)}")
        if short_side is not None and short_side < 1:
            raise ValueError(f"detector.short_side={short_side}: give pixels, or null for the model's own")
        self.text_threshold, self.labels, self.short_side = text_threshold, labels, short_side
        self.separator, self.final_stop = separator, final_stop

    def settings(self) -> dict[str, Any]:
        """Model, thresholds, form of labels and of the text, and size."""
        return {
            **super().settings(),
            "text_threshold": self.text_threshold,
            "labels": self.labels,
            "separator": self.separator,
            "final_stop": self.final_stop,
            "short_side": self.short_side,
        }

    def questions(self, picture: int, asked: Sequence[str]) -> list[_Question]:
        """Sentences of the asked texts, as many in a call as its tokens allow; one that is too long is taken in parts."""
        model: Any = self.model
        room = model.config.max_text_len - 2  # less the tokens of start and end
        calls: list[tuple[list[str], list[int]]] = []
        used = room
        for place, tag in enumerate(asked):
            parted = (_ENDS if self.separator == "." else _COMMAS).split(tag)
            for text in (part for sentence in parted for part in self._parts(_plain(sentence), room - 1)):
                length = self._length(text) + 1
                if used + length > room:
                    calls.append(([], []))
                    used = 0
                calls[-1][0].append(text)
                calls[-1][1].append(place)
                used += length
        return [_Question(picture=picture, texts=tuple(texts), asked=tuple(places)) for texts, places in calls]

    def _length(self, text: str) -> int:
        return len(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _parts(self, text: str, room: int) -> list[str]:
        """The text in pieces of whole words that fit; nothing for an empty one."""
        words = text.split()
        if not words or self._length(text) <= room:
            return [text] if words else []
        if len(words) == 1:
            self.counts["words longer than the detector's text"] += 1
            return []
        half = len(words) // 2
        return self._parts(" ".join(words[:half]), room) + self._parts(" ".join(words[half:]), room)

    def answers(
        self, pictures: Sequence[np.ndarray], questions: Sequence[_Question], asked: Sequence[Sequence[str]]
    ) -> list[_Found]:
        """As in `_OpenDetector`."""
        tokenizer = self._processor.tokenizer
        texts = tokenizer(
            [f"{self.separator} ".join(each.texts) + "." * self.final_stop for each in questions],
            padding=True,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        longest_edge = None if self.short_side is None else round(self.short_side * 1333 / 800)
        size = (
            {} if longest_edge is None else {"size": {"shortest_edge": self.short_side, "longest_edge": longest_edge}}
        )
        seen = self._processor.image_processor([as_pillow(each) for each in pictures], return_tensors="pt", **size)
        model: Any = self.model
        outputs = model(**self.inputs({**texts, **seen}))
        chances = outputs.logits.float().sigmoid().cpu()  # (B, Q, T), 0 for padding
        boxes = _as_corners(outputs.pred_boxes.float().cpu())
        return [
            self._read(question, asked[question.picture], chances[row], boxes[row], texts["input_ids"][row])
            for row, question in enumerate(questions)
        ]

    def _read(self, question: _Question, asked: Sequence[str], chances: Tensor, boxes: Tensor, ids: Tensor) -> _Found:
        """Read labels of a picture's boxes (Q, 4) off their probabilities (Q, T) at the tokens of the question's text."""
        owner = torch.tensor(_owners(ids.tolist(), self._breaks(), len(question.texts)))  # (T,), -1: of no text
        chances = chances[:, : len(owner)].masked_fill(owner < 0, 0)
        scores, surest = chances.max(-1)
        sentence = owner[surest]
        belongs = owner >= 0 if self.labels == "all_tokens" else owner == sentence[:, None]
        words = belongs & (chances > self.text_threshold)
        kept = ((scores > self.box_threshold) & words.any(-1)).nonzero()[:, 0]
        labels = []
        for place in kept.tolist():
            label = asked[question.asked[int(sentence[place])]]
            if self.labels != "asked":
                label = self._processor.tokenizer.decode(ids[words[place]], skip_special_tokens=True).strip()
            labels.append(label)
        return _Found(boxes=boxes[kept], scores=scores[kept], labels=labels)

    def _breaks(self) -> frozenset[int]:
        """The tokens that part what is asked."""
        tokenizer = self._processor.tokenizer
        marks = tokenizer.convert_tokens_to_ids([".", "?", *([","] if self.separator == "," else [])])
        return frozenset({tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, *marks})


class Owlv2(_OpenDetector):
    """OWLv2, and OWL-ViT: each asked text is a query of its own.

    Args:
        template: The text for what is asked, with {} in its place.
        **settings: As in `_OpenDetector`.

    Raises:
        ValueError: The template has no place for it, or a number is out of its range.
    """

    def __init__(self, *, template: str = "a photo of a {}", **settings: Any) -> None:
        super().__init__(**settings)
        if "{}" not in template:
            raise ValueError(
                f"detector.template={template!r}: has no {{}} where what is asked goes; give one such as 'a {{}}'"
            )
        self.template = template

    def settings(self) -> dict[str, Any]:
        """Model, thresholds and template."""
        return {**super().settings(), "template": self.template}

    def questions(self, picture: int, asked: Sequence[str]) -> list[_Question]:
        """Return one question with all texts."""
        places = [place for place, tag in enumerate(asked) if _plain(tag)]
        texts = tuple(self.template.format(_plain(asked[place])) for place in places)
        longest = self._processor.tokenizer.model_max_length
        ids = self._processor.tokenizer(list(texts), verbose=False)["input_ids"]
        self.counts["phrases cut to the detector's text"] += sum(len(row) > longest for row in ids)
        return [_Question(picture=picture, texts=texts, asked=tuple(places))]

    def answers(
        self, pictures: Sequence[np.ndarray], questions: Sequence[_Question], asked: Sequence[Sequence[str]]
    ) -> list[_Found]:
        """As in `_OpenDetector`."""
        model: Any = self.model
        seen = self._processor.image_processor([as_pillow(each) for each in pictures], return_tensors="pt")
        outputs = model(**self.inputs({**self._queries([each.texts for each in questions]), **seen}))
        # its boxes are in parts of the square that the picture was padded to, to the right and below
        height, width = pictures[0].shape[:2]
        scale = torch.tensor([width, height, width, height]) / max(height, width)
        boxes = _as_corners(outputs.pred_boxes.float().cpu()) / scale
        scores, surest = outputs.logits.float().cpu().max(-1)
        found = []
        for row, question in enumerate(questions):
            sure = scores[row].sigmoid()
            kept = (sure > self.box_threshold).nonzero()[:, 0]
            tags = asked[question.picture]
            places: list[int] = surest[row][kept].tolist()
            labels = [tags[question.asked[place]] for place in places]
            found.append(_Found(boxes=boxes[row][kept], scores=sure[kept], labels=labels))
        return found

    def _queries(self, texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Token ids and mask (B * most, T) of B lists; a query that a list lacks begins with 0, which the model leaves out."""
        most = max(len(each) for each in texts)
        flat = self._processor.tokenizer(
            [text for each in texts for text in each], padding="max_length", truncation=True, return_tensors="pt"
        )
        places = torch.tensor([row * most + column for row, each in enumerate(texts) for column in range(len(each))])
        queries = {}
        for name in ("input_ids", "attention_mask"):
            queries[name] = torch.zeros(len(texts) * most, flat[name].shape[1], dtype=torch.int64)
            queries[name][places] = flat[name]
        queries["attention_mask"][:, 0] = 1  # a row without any token to look at would be NaN
        return queries


def _plain(text: str) -> str:
    """A text as models are asked: lower case, without marks that would part it and without space around it."""
    return " ".join(_ENDS.sub(" ", text.lower()).split())


def _as_corners(boxes: Tensor) -> Tensor:
    """Boxes (…, 4) cxcywh as xyxy."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def _owners(ids: Sequence[int], breaks: frozenset[int], count: int) -> list[int]:
    """Return which of `count` texts each token belongs to, -1 for separators; texts are runs of other tokens."""
    owners, number, before = [], -1, True
    for token in ids:
        parts = token in breaks
        number += before and not parts
        owners.append(-1 if parts else min(number, count - 1))
        before = parts
    return owners
