"""What encoding scene graphs costs: batched as here, and scene after scene as published.

From scenes to the prompts of a training step, forward, and backward to the weights of the graph encoder; the text encoders are
frozen. At SDXL's real sizes, random weights:

    published   every mention of a string by itself through both encoders, a graph for every scene, as in `published_graphs`
    cold        `models.conditioning.scene_graph`, no string known
    warm        the same, with the phrases of the graphs in the cache; their texts are never kept

Sides take turns, and the quickest call of each counts: a busy machine slows whatever it likes. The scenes are in `scenes.json`,
in words as frequent in LAION-SG; each word is one token.

    python -m benchmarks.graphs                          8 and 32 scenes of 3, 8 and 15 triples: 5 GB, half an hour on two cores
    python -m benchmarks.graphs --scenes 8 --triples 8   the case with a goal: 20 times as fast
    python -m benchmarks.graphs --small                  two narrow encoders of six layers: to see that it runs
    python -m benchmarks.graphs --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.published_graphs import LENGTH, published_prompt
from models.backbones.stable_diffusion import COMPONENTS
from models.conditioning.base import Conditioning
from models.conditioning.scene_graph import SceneGraphAdapter
from models.packing import Tokens
from models.text import PhraseFeatures, Prompt, TextTower, TextTowers, word_tokenizer
from scenes import Scene, SceneBatch
from scenes.graph import isolated_objects, triples

SCENES = Path(__file__).with_name("scenes.json")
SMALL = {
    "text_encoder": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2},
    "text_encoder_2": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "projection_dim": 96,
    },
}
CACHE = 65536


@dataclass(frozen=True, kw_only=True)
class TextBackbone:
    """The part of a backbone that a graph encoder reads: its text encoders.

    Attributes:
        text: both towers, in one precision.
        text_width: width of a prompt token.
    """

    text: TextTowers
    text_width: int

    def read(self, strings: Sequence[str], *, once: Any = ()) -> Tokens:
        """As `Backbone.read`."""
        return self.text.read(strings, once=once)

    def encode_captions(self, captions: Sequence[str]) -> Prompt:
        """As `Backbone.encode_captions`."""
        return self.text.encode_captions(captions)

    def encode_phrases(self, phrases: Sequence[str]) -> PhraseFeatures:
        """As `Backbone.encode_phrases`."""
        return self.text.encode_phrases(phrases)

    def size_ids(self, scenes: SceneBatch, *, size: Any = None) -> None:
        """None: nothing here is denoised."""


def text_backbone(words: Sequence[str], *, small: bool, device: str, cache: int) -> TextBackbone:
    """SDXL's text encoders with random weights and a tokenizer that knows the words."""
    tokenizer, towers = word_tokenizer(words, max_length=LENGTH), []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = json.loads((COMPONENTS / "sdxl" / name / "config.json").read_text())
        sizes = {**config, "vocab_size": len(tokenizer), **(SMALL[name] if small else {})}
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            encoder: Any = kind(CLIPTextConfig(**sizes))
        towers.append(TextTower(tokenizer, encoder.eval()))
    text = TextTowers(towers, caption_layer="penultimate", caption_pooled=True, phrase_cache=cache)
    return TextBackbone(text=text.requires_grad_(False), text_width=text.width)


def cut(scene: Scene, count: int) -> Scene:
    """The first relations of a scene, the objects that they name, and those that no relation of the whole scene names."""
    relations = scene.relations[:count]
    named = {place for relation in relations for place in (relation.subject, relation.object)}
    places = sorted(named | set(isolated_objects(scene)))
    return replace(
        scene,
        objects=tuple(scene.objects[place] for place in places),
        relations=tuple(replace(r, subject=places.index(r.subject), object=places.index(r.object)) for r in relations),
    )


def repeated(scenes: Sequence[Scene]) -> float:
    """Share of the strings of triples that came before in the batch."""
    strings = [string for scene in scenes for triple in triples(scene) for string in triple]
    return 1 - len(set(strings)) / len(strings)


def in_turns(sides: dict[str, Callable[[], Tensor]], rounds: dict[str, int], device: str) -> dict[str, float]:
    """Least seconds of each side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(max(rounds.values())):
        for name, run in sides.items():
            if turn < rounds[name]:
                if device == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
    return {name: min(each) for name, each in seconds.items()}


class Bench:
    """Both ways over the same weights.

    Args:
        scenes: whole scenes, in which words are known.
        small: narrow encoders.
        device: "cpu" or "cuda".
        rounds: calls of ours; the published side takes at most two.
    """

    def __init__(self, scenes: Sequence[Scene], *, small: bool, device: str, rounds: int) -> None:
        self.scenes, self.device, self.rounds = scenes, device, rounds
        strings = [item.phrase for s in scenes for item in s.objects] + [
            r.predicate for s in scenes for r in s.relations
        ]
        words = sorted({word for string in strings for word in string.split()})
        self.plain: Any = text_backbone(words, small=small, device=device, cache=0)
        kept = TextTowers(self.plain.text.each, caption_layer="penultimate", caption_pooled=True, phrase_cache=CACHE)
        self.keeping: Any = TextBackbone(text=kept, text_width=kept.width)
        self.adapter = SceneGraphAdapter(self.plain).to(device)
        torch.nn.init.constant_(self.adapter.encoder.gate, 0.5)

    def ours(self, backbone: Any, scenes: Sequence[Scene]) -> Tensor:
        """Prompts of all scenes, batched, and the gradients of the encoder's weights."""
        batch = SceneBatch(scenes)
        inputs = Conditioning({"scene_graph": self.adapter})(backbone, batch, batch.captions, (64, 64))
        return self._backward(inputs.prompt)

    def published(self, scenes: Sequence[Scene]) -> Tensor:
        """The same, scene after scene."""
        return self._backward(torch.cat([published_prompt(self.plain, self.adapter.encoder, s)[0] for s in scenes]))

    def _backward(self, prompt: Tensor) -> Tensor:
        self.adapter.zero_grad()
        prompt.square().mean().backward()
        return prompt.detach()

    def case(self, count: int, number: int) -> None:
        """One row of the table: `count` scenes of `number` triples."""
        scenes = [cut(scene, number) for scene in self.scenes[:count]]
        difference = (self.ours(self.plain, scenes) - self.published(scenes)).abs().max()
        self.ours(self.keeping, scenes)
        sides = {
            "published": lambda: self.published(scenes),
            "cold": lambda: self.ours(self.plain, scenes),
            "warm": lambda: self.ours(self.keeping, scenes),
        }
        rounds = {"published": min(self.rounds, 2), "cold": self.rounds, "warm": self.rounds}
        seconds = in_turns(sides, rounds, self.device)
        cold, warm = (seconds["published"] / seconds[name] for name in ("cold", "warm"))
        print(
            f"{count:3} scenes of {number:2} triples, {100 * repeated(scenes):2.0f} % of strings repeated: published "
            f"{seconds['published']:8.3f} s, cold {seconds['cold']:7.3f} s ({cold:5.1f} x), warm {seconds['warm']:7.3f} s "
            f"({warm:5.1f} x); differ by at most {difference:.0e}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--triples", type=int, nargs="+", default=[3, 8, 15])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args(arguments)
    scenes = [Scene.from_json(item) for item in json.loads(SCENES.read_text())["graphs"]]
    bench = Bench(scenes, small=asked.small, device=asked.device, rounds=asked.rounds)
    sizes = "narrow" if asked.small else "SDXL's"
    print(f"encoding scene graphs, {sizes} text encoders, fp32 on {asked.device}, {torch.get_num_threads()} threads")
    for count in asked.scenes:
        for number in asked.triples:
            bench.case(count, number)


if __name__ == "__main__":
    main()
