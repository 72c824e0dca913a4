"""The stage `graphs`: scene graphs for plain pictures, written by a vision-language model as LAION-SG's were.

The model is asked through `labelling.vision_language`; the words of the prompt are in `conf/stage/graphs.yaml`. What an entry of
LAION-SG means is in `scenes/forms.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Self

import numpy as np

from datamodules.shard_index import ShardError
from datamodules.sources.base import LeftOut
from labelling.json_answer import UNPARSABLE, json_of
from labelling.vision_language import Account, Answer, NoAnswer, Question, VisionLanguage, text_hash
from preparation.stage import Sample, Stage
from scenes.checks import SceneError
from scenes.forms import GraphError, scene_of_laion_sg
from scenes.scene import Scene

SPENT, FAILED = ("answered", "tokens_in", "tokens_out"), "failed: "  # what is summed over shards
PLACED = frozenset({"boxes", "masks", "descriptions", "scores"})  # of objects that the graph's take the place of


class Graphs(Stage):
    """Objects with attributes, and relations between them, for pictures that have none.

    The graph takes the place of what objects and relations a scene has, which is counted. A sample whose answer fails, cannot be
    read or is no scene graph is not passed on. Answers are kept by the model's own cache, so that a stage that starts again
    asks only what was not answered.

    Args:
        model: Who writes the graphs.
        prompt: What is asked; the answer is JSON `{"items": [{"item_id", "label", "attributes"}], "relations": [{"item1",
            "relation", "item2"}]}`. `{caption}` becomes the scene's caption.
        min_relations: Graphs with fewer relations go, and are counted.
        batch_size: Pictures in memory at a time; it changes nothing else.
    """

    name: ClassVar[str] = "graphs"
    requires = frozenset({"image"})

    def __init__(self, *, model: VisionLanguage, prompt: str, min_relations: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        for setting, value, least in (("min_relations", min_relations, 0), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"stage.{setting}={value}: give {least} or more")
        self.model, self.prompt = model, prompt
        self.min_relations, self.batch_size = min_relations, batch_size

    def settings(self) -> dict[str, Any]:
        """The model, the prompt and what is left out."""
        return {
            "model": self.model.settings(),
            "prompt_sha256": text_hash(self.prompt),
            "min_relations": self.min_relations,
        }

    def provides(self, provided: frozenset[str]) -> frozenset[str]:
        """Phrases, attributes and relations; what belonged to the objects before is gone."""
        return provided - PLACED | {"phrases", "attributes", "relations"}

    def to(self, device: Any) -> Self:
        """The stage with its model on a device; as `Part.to`."""
        self.model.to(device)
        return self

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Write the graphs of one shard.

        Args:
            samples: Samples with pictures.

        Yields:
            The samples whose graph is sound.

        Raises:
            PartMissing: The model cannot be asked anything here.
            TooManyFailures: The model could not be asked too often.
        """
        self.left_out = LeftOut()
        spent = Account(price=self.model.account.price)
        samples = iter(samples)
        while batch := list(islice(samples, self.batch_size)):
            questions: dict[str, Question] = {}
            for sample in batch:
                try:
                    questions[sample.key] = self.question(sample)
                except ShardError as error:
                    self.left_out.skip(error)
            answers = dict(zip(questions, self.model.ask_all(list(questions.values())), strict=True))
            for answer in answers.values():
                # kept or new: the cost of a shard is the same whoever has asked
                spent.add(answer if isinstance(answer, NoAnswer) else replace(answer, from_cache=False))
            for sample in batch:
                if sample.key in answers and (scene := self._graph(sample, answers[sample.key])) is not None:
                    yield sample.with_scene(scene)
        self.left_out.tallies.update({name: getattr(spent, name) for name in SPENT})
        self.left_out.tallies.update({f"{FAILED}{reason}": count for reason, count in spent.failures.items()})

    def report(self, total: LeftOut) -> list[str]:
        """Return the account of all graphs.

        Args:
            total: The account of all shards.

        Returns:
            One line.
        """
        failures = Counter(
            {name.removeprefix(FAILED): n for name, n in total.tallies.items() if name.startswith(FAILED)}
        )
        spent = {name: total.tallies[name] for name in SPENT}
        return [f"graphs: {Account(**spent, failures=failures, price=self.model.account.price)}"]

    def question(self, sample: Sample) -> Question:
        """Return the question about a sample; raises `ShardError` where it has no picture that can be decoded."""
        prompt = self.prompt.replace("{caption}", sample.scene.caption)
        return Question(picture=np.asarray(sample.picture()), prompt=prompt)

    def _graph(self, sample: Sample, answer: Answer | NoAnswer) -> Scene | None:
        """The sample's scene with the answered graph; None where it has none, which is told."""
        where = f"sample {sample.key}: scene {sample.scene.id}"
        if isinstance(answer, NoAnswer):
            return self._failed(where, answer, answer.reason)
        try:
            graph = graph_of(answer.text, sample.scene)
        except NoAnswer as failure:
            return self._failed(where, failure, failure.reason)
        except SceneError as error:
            return self._failed(where, error, error.reason if isinstance(error, GraphError) else UNPARSABLE)
        if len(graph.relations) < self.min_relations:
            self.left_out.counts["graphs with fewer relations than min_relations"] += 1
            return None
        if sample.scene.objects:
            self.left_out.counts["objects replaced"] += len(sample.scene.objects)
        said = {"graphs": {**self.settings(), "answered_by": answer.model or self.model.model}}
        return replace(
            sample.scene,
            objects=graph.objects,
            relations=graph.relations,
            provenance={**sample.scene.provenance, **said},
        )

    def _failed(self, where: str, failure: Exception, reason: str) -> None:
        """Report a sample without a graph."""
        self.left_out.skip(f"{where}: graph: {failure}")
        self.left_out.counts[f"graphs failed: {reason}"] += 1


def graph_of(text: str, scene: Scene) -> Scene:
    """The scene graph that an answer is.

    Args:
        text: JSON of the form of an entry of LAION-SG.
        scene: The scene that it is about; id and caption are taken from it.

    Returns:
        A scene of objects and relations, one that is given twice twice.

    Raises:
        NoAnswer: The answer is no JSON.
        GraphError: It is no scene graph, or an empty one.
    """
    said: Mapping[str, Any] = json_of(text)
    entry = {**said, "img_id": scene.id, "caption_ori": scene.caption}
    graph = scene_of_laion_sg(entry, where="answer")
    if not graph.objects:
        raise GraphError("answer: items: is empty; the picture shows nothing that was named", reason="empty graph")
    return graph
