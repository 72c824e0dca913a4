"""What regional attention costs: as published, computed once, and beside the UNet's own cross-attention.

At the shapes of SDXL with 512 and 1024 px, forward and backward with gradients for hidden states, tokens and weights:

    published   every position once for each of 30 slots, padded text, as in `published_regions`
    ours        `models.conditioning.regions`
    own         the UNet's own cross-attention over 77 tokens, as the floor
    allowed     the ratio of published to ours that the multiplications which have to be done allow

Seconds are those of the process, not of the clock, so that a shared machine tells the same. Memory is what a forward pass keeps
for the backward pass, weights not counted. The stack of 70 is composed of its two kinds of layer: 10 of width 640, 60 of 1280.

    python -m benchmarks.regions                          on one core; the published function is slow there: take a long tea
    python -m benchmarks.regions --only ca --pixels 512   a part of it
    python -m benchmarks.regions --device cuda --compile  in bf16 on a GPU
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.published_regions import published_attention, published_inputs, published_tokens, slots_needed
from models.backbones.stable_diffusion import StableDiffusion
from models.conditioning.regions.attention import RegionalAttention, RegionPayload
from models.conditioning.regions.levels import batch_regions, region_level
from models.conditioning.regions.tokens import RegionText, RegionTokens, RegionWriter
from models.conditioning.slots import BlockSite
from models.text import TextTower, TextTowers, word_tokenizer
from scenes import Scene, SceneBatch

SCENES = Path(__file__).with_name("scenes.json")
CONTEXT = 2048
SLOTS = 30
STACK = {512: ((10, 640, 10, 32), (60, 1280, 20, 16)), 1024: ((10, 640, 10, 64), (60, 1280, 20, 32))}
"""Picture side -> (layers, width, heads, side of the grid) of SDXL's two kinds of block."""
STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one layer: seconds forward and backward, bytes kept between them, multiply-adds times 2 of a forward pass."""

    seconds: float
    kept: int = 0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(seconds=self.seconds + other.seconds, kept=self.kept + other.kept, flops=self.flops + other.flops)

    def times(self, count: int) -> Cost:
        """The same for `count` layers."""
        return Cost(seconds=self.seconds * count, kept=self.kept * count, flops=self.flops * count)


class Bench:
    """One scene at a time on one device.

    Args:
        device: "cpu" or "cuda".
        compiled: compile ours.
        rounds: calls of each side, the quickest counts; the published side on a CPU takes one.
    """

    def __init__(self, *, device: str, compiled: bool, rounds: int) -> None:
        self.device, self.compiled, self.rounds = device, compiled, rounds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.scenes = [Scene.from_json(item) for item in json.loads(SCENES.read_text())["regions"]]
        words = {word for scene in self.scenes for item in scene.objects for word in item.phrase.split()}
        tokenizer = word_tokenizer(sorted(words), max_length=77)
        config = CLIPTextConfig(  # one layer of the real width: what it says does not matter, its shape does
            vocab_size=len(tokenizer),
            hidden_size=CONTEXT,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=16,
        )
        torch.manual_seed(0)
        self.text = TextTowers([TextTower(tokenizer, CLIPTextModel(config).eval())]).requires_grad_(False)
        self.network = RegionTokens(text_width=CONTEXT, width=CONTEXT, hidden=512, frequencies=8).requires_grad_(False)

    def layer(self, width: int, heads: int, variant: str) -> RegionalAttention:
        """A layer that acts."""
        site = BlockSite(path="", width=width, heads=heads, head_width=width // heads, cross_width=CONTEXT, level=0)
        layer = RegionalAttention(site, token_width=CONTEXT, place=0, within=variant == "casa")
        for each in (layer.attn, layer.self_attn):
            if each is not None:
                torch.nn.init.normal_(each["to_out"][0].weight, std=0.02)
        return layer.to(self.device, self.dtype)

    @torch.no_grad()
    def ours(self, scene: Scene, pixels: int, side: int, variant: str) -> tuple[RegionPayload, dict[str, float]]:
        """The payload of a scene, and what it says of the work that has to be done."""
        scenes = SceneBatch([scene])
        regions = batch_regions(scenes, (pixels // 8,) * 2, rasterise="exact", most=None, at_random=False)
        boxes = scenes.boxes[0].tolist()
        rows = [
            RegionText(
                texts=[scene.objects[n].phrase for n in inside],
                boxes=[tuple(boxes[n]) for n in inside],
                iou=shares,
                scope=0,
                names=inside,
            )
            for inside, shares in zip(regions.members, regions.iou, strict=True)
        ]
        writer = RegionWriter(tokenise=self.text.each[0].tokenise, max_length=77, overflow="joined", scale=1.0)
        words = writer(rows, self.text.encode_phrases, torch.device("cpu"))
        level = region_level(regions, words.rows, (side, side), rasterise="exact", within=variant == "casa")
        held = level.bias.isfinite().sum(-1).flatten().float()  # tokens of each block's region
        own = held.repeat_interleave(level.query.shape[1])[level.place]
        seen = 0.0 if level.together is None else float((level.together == 0).sum())
        payload = RegionPayload(tokens=self.network(words.features, words.boxes), levels={side * side: level})
        work = {"regions": len(rows), "tokens": len(words.features), "pairs": float(own.sum()), "seen": seen}
        return self._moved(payload), work

    def _moved(self, payload: RegionPayload) -> RegionPayload:
        levels = {
            length: type(level)(
                **{
                    name: None if value is None else value.to(self.device)
                    for name, value in ((name, getattr(level, name)) for name in level.__dataclass_fields__)
                }
            )
            for length, level in payload.levels.items()
        }
        return RegionPayload(tokens=payload.tokens.to(self.device, self.dtype), levels=levels)

    @torch.no_grad()
    def published(self, scene: Scene, pixels: int, side: int) -> tuple[list[Tensor], int]:
        """Tokens, bias, masks and unions of 30 slots, and how many the scene would need."""
        size = (pixels // 8,) * 2
        needed = slots_needed([scene], size, rasterise="exact")
        inputs = published_inputs(SceneBatch([scene]), self.text, size, slots=max(SLOTS, needed), rasterise="exact")
        tokens = published_tokens(self.network, inputs)
        masks, unions = inputs.at((side, side), "nearest-exact")
        each = [tensor[:, :SLOTS].contiguous() for tensor in (tokens, inputs.bias, masks, unions)]
        return [tensor.to(self.device, self.dtype) for tensor in each], needed

    def measure(self, run: Callable[[], Tensor], *, rounds: int, weights: Iterable[nn.Parameter]) -> Cost:
        """Seconds of a forward and backward pass, the quickest of some, and what it keeps in between."""
        weights = list(weights)
        kept = _kept(run, weights)
        pull = torch.randn_like(run().detach())
        seconds = []
        for _ in range(rounds):
            for weight in weights:
                weight.grad = None  # as an optimizer's zero_grad leaves it
            began = self._now()
            run().backward(pull)
            seconds.append(self._now() - began)
        return Cost(seconds=min(seconds), kept=kept)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def _kept(run: Callable[[], Tensor], weights: Iterable[nn.Parameter]) -> int:
    """Bytes of the distinct storages that a forward pass keeps, without those of weights (and of views of them)."""
    storages: dict[int, int] = {}
    known = {weight.untyped_storage().data_ptr() for weight in weights}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            storages[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(storages.values())


def needed_flops(*, length: int, width: int, work: dict[str, float], variant: str) -> float:
    """What a forward pass cannot do without: each position and distinct token projected once, each seen pair once."""
    across = 4 * length * width**2 + 4 * work["tokens"] * CONTEXT * width + 4 * work["pairs"] * width
    return across + (8 * length * width**2 + 4 * work["seen"] * width if variant == "casa" else 0)


def published_flops(*, length: int, width: int, variant: str) -> float:
    """The forward pass as published."""
    tokens = SLOTS * 77
    across = SLOTS * 4 * length * width**2 + 4 * tokens * CONTEXT * width + 4 * tokens * length * width
    return across + (SLOTS * (8 * length * width**2 + 4 * length**2 * width) if variant == "casa" else 0)


def own_attention(bench: Bench, width: int, heads: int, side: int) -> Cost:
    """The UNet's own cross-attention over 77 tokens, trained like ours."""
    attention = Attention(query_dim=width, cross_attention_dim=CONTEXT, heads=heads, dim_head=width // heads)
    attention = attention.to(bench.device, bench.dtype)
    hidden = torch.randn(1, side * side, width, device=bench.device, dtype=bench.dtype, requires_grad=True)
    prompt = torch.randn(1, 77, CONTEXT, device=bench.device, dtype=bench.dtype, requires_grad=True)
    return bench.measure(
        lambda: attention(hidden, encoder_hidden_states=prompt), rounds=bench.rounds, weights=attention.parameters()
    )


def one_kind(
    bench: Bench, *, pixels: int, width: int, heads: int, side: int, variant: str
) -> dict[str, dict[str, Cost]]:
    """Every side's cost of one kind of layer, by scene; the published one does not depend on the scene."""
    length, layer = side * side, bench.layer(width, heads, variant)
    hidden = torch.randn(1, length, width, device=bench.device, dtype=bench.dtype, requires_grad=True)
    inputs, _ = bench.published(bench.scenes[0], pixels, side)
    tokens = inputs[0].requires_grad_()
    slow = bench.measure(
        lambda: published_attention(layer, hidden, tokens, *inputs[1:]),
        rounds=1 if bench.device == "cpu" else bench.rounds,
        weights=layer.parameters(),
    )
    slow = Cost(
        seconds=slow.seconds, kept=slow.kept, flops=published_flops(length=length, width=width, variant=variant)
    )
    own = own_attention(bench, width, heads, side)
    run = torch.compile(layer, fullgraph=True) if bench.compiled else layer
    costs: dict[str, dict[str, Cost]] = {}
    for scene in bench.scenes:
        payload, work = bench.ours(scene, pixels, side, variant)
        payload.tokens.requires_grad_()
        fast = bench.measure(functools.partial(run, hidden, payload), rounds=bench.rounds, weights=layer.parameters())
        inputs, slots = bench.published(scene, pixels, side)
        note = f"{slots} regions, {work['tokens']} distinct tokens"
        if slots <= SLOTS:
            with torch.no_grad():
                difference = (layer(hidden, payload) - published_attention(layer, hidden, *inputs)).abs().max()
            note += f", differs from the published by at most {difference:.0e}"
        flops = needed_flops(length=length, width=width, work=work, variant=variant)
        with torch.no_grad():
            kept = RegionPayload(tokens=payload.tokens, levels=payload.levels, kept=(layer.project(payload.tokens),))
            seconds = _quickest(functools.partial(layer, hidden, kept), bench)
        costs[scene.id] = {
            "published": slow,
            "ours": Cost(seconds=fast.seconds, kept=fast.kept, flops=flops),
            "own": own,
            "step": Cost(seconds=seconds),
        }
        _row(f"    C={width} L={length}, {scene.id} ({note})", costs[scene.id])
    return costs


def _quickest(run: Callable[[], Any], bench: Bench) -> float:
    seconds = []
    for _ in range(bench.rounds):
        began = bench._now()
        run()
        seconds.append(bench._now() - began)
    return min(seconds)


def _row(title: str, costs: dict[str, Cost]) -> None:
    slow, fast, own = (costs[name] for name in ("published", "ours", "own"))
    allowed = slow.flops / fast.flops
    reached = slow.seconds / fast.seconds
    print(title)
    print(
        f"      published {slow.seconds * 1e3:9.1f} ms {slow.kept / 2**20:8.1f} MiB | ours {fast.seconds * 1e3:7.1f} ms "
        f"{fast.kept / 2**20:6.1f} MiB | own {own.seconds * 1e3:7.1f} ms | {reached:5.1f} x as fast, {allowed:5.1f} x allowed "
        f"({reached / allowed:.2f}), memory {slow.kept / fast.kept:5.1f} x less, {fast.seconds / own.seconds:.2f} x own",
        flush=True,
    )


def stack(bench: Bench, *, pixels: int, variant: str) -> None:
    """Both kinds of layer, then the 70 of them."""
    print(f"{variant} at {pixels} px, batch 1, {str(bench.dtype).removeprefix('torch.')} on {bench.device}")
    kinds = [
        (count, one_kind(bench, pixels=pixels, width=width, heads=heads, side=side, variant=variant))
        for count, width, heads, side in STACK[pixels]
    ]
    for scene in bench.scenes:
        parts = [{name: cost.times(count) for name, cost in costs[scene.id].items()} for count, costs in kinds]
        whole = {name: parts[0][name] + parts[1][name] for name in parts[0]}
        _row(f"  stack of 70, {scene.id}", whole)
        print(f"      a sampling step with keys and values kept: {whole['step'].seconds * 1e3:.0f} ms", flush=True)


def share_of_a_picture(bench: Bench) -> None:
    """What the regions add to a picture of 50 steps, in multiplications: the UNet once a step, keys and values once."""
    for pixels, layers in STACK.items():
        backbone = StableDiffusion.from_configs("sdxl", device="meta")
        unet: UNet2DConditionModel = backbone.unet
        meta = {"device": "meta"}
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            unet(
                torch.zeros(1, 4, pixels // 8, pixels // 8, **meta),
                torch.zeros(1, **meta),
                encoder_hidden_states=torch.zeros(1, 77, CONTEXT, **meta),
                added_cond_kwargs={"text_embeds": torch.zeros(1, 1280, **meta), "time_ids": torch.zeros(1, 6, **meta)},
            )
        bare = counted.get_total_flops() * STEPS
        for variant in ("ca", "casa"):
            for scene in bench.scenes:
                once = every = 0.0
                for count, width, _, side in layers:
                    _, work = bench.ours(scene, pixels, side, variant)
                    projected = 4 * work["tokens"] * CONTEXT * width
                    whole = needed_flops(length=side * side, width=width, work=work, variant=variant)
                    once, every = once + count * projected, every + count * (whole - projected)
                regions = once + STEPS * every
                print(
                    f"  {pixels} px, {variant}, {scene.id}: {100 * regions / (bare + regions):.1f} % of the multiplications of "
                    f"{STEPS} steps, of that {100 * once / regions:.1f} % once; projected at every step they would be "
                    f"{100 * (once + every) * STEPS / (bare + (once + every) * STEPS):.1f} %"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ca", "casa"), default=None)
    parser.add_argument("--pixels", type=int, choices=tuple(STACK), default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args(arguments)
    bench = Bench(device=asked.device, compiled=asked.compile, rounds=asked.rounds)
    if asked.device == "cpu":
        torch.set_num_threads(1)
    for variant in (asked.only,) if asked.only else ("ca", "casa"):
        for pixels in (asked.pixels,) if asked.pixels else tuple(STACK):
            stack(bench, pixels=pixels, variant=variant)
    if asked.pixels is None:
        print("share of a picture")
        share_of_a_picture(bench)


if __name__ == "__main__":
    main()
