"""SG-IoU, Entity-IoU and Relation-IoU: a vision-language model lists what it sees, and lists are compared as sets.

The closed lists are LAION-SG's published protocol; the open ones let the judge name what it sees in its own words. The model is
asked through `labelling.vision_language`. The words of the prompts are in `conf/metric`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from labelling.json_answer import json_of, unparsable
from labelling.parts import PartMissing
from labelling.vision_language import Answer, NoAnswer, Question, TooManyFailures, VisionLanguage, text_hash
from metrics.base import NotAvailable, Row, SceneMetric, check_images
from scenes.scene import Scene

Triple = tuple[str, ...]
ARTICLES = ("a ", "an ", "the ")
MATCHING = ("exact", "folded")
LISTS = ("json", "python")
KEYS = ("scene_graph", "object_list", "predicate_list")


@dataclass(frozen=True, kw_only=True)
class Lists:
    """A scene graph as three sets; attributes are not in them, and what is there twice counts once.

    Attributes:
        triples: Subject, predicate, object.
        entities: The objects.
        predicates: The predicates.
    """

    triples: frozenset[Triple]
    entities: frozenset[str]
    predicates: frozenset[str]


def set_iou(asked: frozenset[Any], seen: frozenset[Any]) -> float | None:
    """Intersection over union of two sets; None where both are empty (the published script has 0 there)."""
    return len(asked & seen) / len(union) if (union := asked | seen) else None


def folded(text: str) -> str:
    """A text for comparison: lower case, `_` and `-` as spaces, single spaces, no article before it."""
    text = " ".join(text.lower().replace("_", " ").replace("-", " ").split())
    return next((text[len(article) :] for article in ARTICLES if text.startswith(article)), text)


def asked_of(scene: Scene) -> tuple[list[Triple], list[str], list[str]]:
    """What a Scene asks for: its triples of labels, their distinct entities and predicates, in order.

    An object's label is its noun, or its phrase where the noun is not known. Objects in no relation are not asked for, as
    published.
    """
    names = [item.label or item.phrase for item in scene.objects]
    triples = [(names[item.subject], item.predicate, names[item.object]) for item in scene.relations]
    entities = dict.fromkeys(name for subject, _, other in triples for name in (subject, other))
    return triples, list(entities), list(dict.fromkeys(predicate for _, predicate, _ in triples))


def lists_of(text: str) -> tuple[list[Triple], list[str], list[str]]:
    """The lists of a judge's answer.

    Args:
        text: JSON `{"scene_graph": [[subject, predicate, object]], "object_list": [text], "predicate_list": [text]}`; a list that
            is not there is empty, as published, but not all three.

    Returns:
        Triples, entities and predicates, as answered.

    Raises:
        NoAnswer: It is not that.
    """
    said = json_of(text)
    if not any(key in said for key in KEYS):
        raise unparsable(text, f"without {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(said.get(key, []), list):
            raise unparsable(text, f"without a list under {key}")
    graph, entities, predicates = (said.get(key, []) for key in KEYS)
    if not all(isinstance(triple, list) and _are_texts(triple) for triple in graph):
        raise unparsable(text, "with a triple that is no list of texts")
    if not _are_texts(entities) or not _are_texts(predicates):
        raise unparsable(text, "with an object or predicate that is no text")
    return [tuple(triple) for triple in graph], entities, predicates


class SgIou(SceneMetric):
    """The published protocol: the judge chooses from the scene's own entities and predicates.

    Of each picture it answers with triples, a list of objects and one of predicates; each is compared with the scene's as a set.
    What it answers outside the lists counts against the picture. Scenes without relations ask for nothing: the judge is not
    asked, and they do not count. A failed or unreadable answer is a failure of the row, and does not count either.

    Args:
        model: The judge.
        prompt: What it is asked; `{entities}` and `{predicates}` become the scene's lists as JSON.
        matching: "exact" compares texts as they are (published), "folded" as `folded` has them.
        lists: How the scene's lists are written, as "json" or as "python" writes them (published).
        bounds: Whether real and shuffled images are judged too; a judge may be billed by the image.
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.

    Source: Li et al. 2024, LAION-SG (arXiv 2412.08580), and its released script; the measures are SG-Adapter's
        (Shen et al. 2024).
    """

    name = "sg_iou"
    requires = frozenset({"relations"})
    columns = ("sg_iou", "entity_iou", "relation_iou")
    placeholders: ClassVar[tuple[str, ...]] = ("{entities}", "{predicates}")

    def __init__(
        self,
        *,
        model: VisionLanguage,
        prompt: str,
        matching: str = "exact",
        lists: str = "json",
        bounds: bool = False,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(resamples=resamples, seed=seed)
        if lists not in LISTS:
            raise ValueError(f"metric.{self.name}.lists={lists}: no such way; choose {' or '.join(LISTS)}")
        if matching not in MATCHING:
            raise ValueError(f"metric.{self.name}.matching={matching}: no such way; choose {' or '.join(MATCHING)}")
        for placeholder in self.placeholders:
            if placeholder not in prompt:
                raise ValueError(
                    f"metric.{self.name}.prompt: has no {placeholder}; the judge must see the scene's list"
                )
        self.model, self.prompt, self.matching, self.lists = model, prompt, matching, lists
        self.bounds = bounds

    def settings(self) -> dict[str, Any]:
        """The judge, what it is asked and how texts are compared."""
        asked = {"prompt_sha256": text_hash(self.prompt), "lists": self.lists}
        return {"judge": self.model.settings(), **asked, "matching": self.matching}

    def to(self, device: Any) -> Self:
        """The metric with its judge on a device, where the judge is here.

        Args:
            device: Where it is to work.

        Returns:
            The metric.

        Raises:
            NotAvailable: The judge's weights, address or API key are not there.
        """
        try:
            self.model.to(device)
        except PartMissing as error:
            raise self._not_available(error) from None
        return self

    def question(self, image: np.ndarray, scene: Scene) -> Question:
        """What is asked about a picture (H, W, 3) uint8 RGB of a Scene."""
        _, entities, predicates = asked_of(scene)
        prompt = self.prompt
        for placeholder, words in (("{entities}", entities), ("{predicates}", predicates)):
            written = str(words) if self.lists == "python" else json.dumps(words, ensure_ascii=False)
            prompt = prompt.replace(placeholder, written)
        return Question(picture=image, prompt=prompt)

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """Asks about B pictures, several at a time.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows: "scene", the columns, "answer" as the judge gave it, "tokens" in and out; or "failure".

        Raises:
            NotAvailable: The judge cannot be asked, or could not too often.
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        asks = [bool(scene.relations) for scene in scenes]
        questions = [self.question(image, scene) for image, scene, yes in zip(images, scenes, asks, strict=True) if yes]
        try:
            answers = iter(self.model.ask_all(questions))
        except (PartMissing, TooManyFailures) as error:
            raise self._not_available(error) from None
        nothing = {"scene": "", **dict.fromkeys(self.columns)}
        return [
            self._row(scene, next(answers)) if yes else {**nothing, "scene": scene.id}
            for scene, yes in zip(scenes, asks, strict=True)
        ]

    def score(self, image: np.ndarray, scene: Scene) -> Row:
        """The row of one picture (H, W, 3) uint8 RGB."""
        return self.measure([image], [scene])[0]

    def ious(self, scene: Scene, text: str) -> dict[str, float | None]:
        """The columns, of a judge's answer.

        Args:
            scene: What was asked for.
            text: The answer, as `lists_of` reads it.

        Returns:
            IoU of triples, of entities and of predicates, in [0, 1].

        Raises:
            NoAnswer: The answer cannot be read.
        """
        asked, seen = self._lists(*asked_of(scene)), self._lists(*lists_of(text))
        values = [
            set_iou(asked.triples, seen.triples),
            set_iou(asked.entities, seen.entities),
            set_iou(asked.predicates, seen.predicates),
        ]
        return dict(zip(self.columns, values, strict=True))

    def _row(self, scene: Scene, answer: Answer | NoAnswer) -> Row:
        """The row of one answer."""
        if isinstance(answer, NoAnswer):
            return {"scene": scene.id, "failure": str(answer)}
        kept = {"answer": answer.text, "tokens": [answer.tokens_in, answer.tokens_out], "judge": answer.model}
        try:
            return {"scene": scene.id, **self.ious(scene, answer.text), **kept}
        except NoAnswer as failure:
            return {"scene": scene.id, "failure": str(failure), **kept}

    def _lists(self, triples: Iterable[Triple], entities: Iterable[str], predicates: Iterable[str]) -> Lists:
        """Lists as the sets that are compared."""
        same = folded if self.matching == "folded" else str
        return Lists(
            triples=frozenset(tuple(map(same, triple)) for triple in triples),
            entities=frozenset(map(same, entities)),
            predicates=frozenset(map(same, predicates)),
        )

    def _not_available(self, error: Exception) -> NotAvailable:
        return NotAvailable(f"metric.{self.name}.model: {error}")


class OpenSgIou(SgIou):
    """The open lists: the judge is not told what the scene asks for, and names what it sees in its own words.

    Texts are compared folded, and synonyms do not match, so that values are far below those of the closed lists and can be
    compared with each other alone: with those of the true pictures first of all.

    Args:
        model: The judge.
        prompt: What it is asked.
        matching: As in `SgIou`.
        **settings: As in `SgIou`.
    """

    name = "sg_iou_open"
    columns = ("sg_iou_open", "entity_iou_open", "relation_iou_open")
    placeholders = ()

    def __init__(self, *, model: VisionLanguage, prompt: str, matching: str = "folded", **settings: Any) -> None:
        super().__init__(model=model, prompt=prompt, matching=matching, **settings)


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
