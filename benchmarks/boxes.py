"""What grounding costs: phrase features, a slot's attention and a training step, against the published way.

Both sides of every ratio run in turns in one process. The published way: every phrase padded to 77 tokens and encoded picture by
picture, every scene padded to its slots with null tokens, diffusers' own gated UNet.

    python -m benchmarks.boxes                     phrase features, slots, and a step of tiny backbones
    python -m benchmarks.boxes --sdxl --compile    a step of SDXL at 512 px at random weights, on a GPU
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from models.backbones.base import Backbone
from models.backbones.stable_diffusion import COMPONENTS, StableDiffusion
from models.backbones.tiny import tiny_backbone
from models.conditioning.base import Conditioning
from models.conditioning.boxes import BoxesAdapter
from models.conditioning.boxes.adapter import BoxPayload, GatedSelfAttention
from models.conditioning.boxes.weights import published_tensors
from models.conditioning.slots import BlockSite
from models.text import Prompt, TextTower, TextTowers, word_tokenizer
from scenes import Frame, Scene, SceneBatch, SceneObject

THINGS = """person bicycle car airplane bus train truck boat bench bird cat dog horse sheep cow elephant bear zebra giraffe
    backpack umbrella tie suitcase kite bottle cup fork knife spoon bowl banana apple orange carrot pizza cake chair couch
    bed toilet laptop mouse remote keyboard oven sink book clock vase""".split()
LOOKS = "a the red green blue small large old young wooden striped wet".split()
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # bf16, dense, as NVIDIA states them


def scenes(pictures: int, boxes: int, *, side: int) -> SceneBatch:
    """Scenes with phrases of two to four words, of which some come twice."""
    generator = torch.Generator().manual_seed(0)

    def draw(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    rows = []
    for picture in range(pictures):
        corners = torch.rand(boxes, 2, 2, generator=generator).sort(dim=1).values * 0.8
        items = tuple(
            SceneObject(
                phrase=" ".join([*(draw(LOOKS) for _ in range(1 + place % 3)), draw(THINGS)]),
                box=(float(low[0]), float(low[1]), float(high[0]) + 0.2, float(high[1]) + 0.2),
            )
            for place, (low, high) in enumerate(corners)
        )
        caption = "a young person and a dog"
        rows.append(Scene(id=str(picture), caption=caption, objects=items, frame=Frame(original=(side, side))))
    return SceneBatch(rows)


def in_turns(sides: dict[str, Callable[[], Any]], *, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each side; the first call of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def phrase_features(*, rounds: int) -> None:
    """8 pictures x 30 phrases through a text encoder of CLIP-L's size, at random weights."""
    tokenizer = word_tokenizer([*THINGS, *LOOKS], max_length=77)
    config = {
        **json.loads((COMPONENTS / "sd15" / "text_encoder" / "config.json").read_text()),
        "vocab_size": len(tokenizer),
    }
    encoder = CLIPTextModel(CLIPTextConfig(**config)).eval().requires_grad_(False)
    plain, keeping = (TextTowers([TextTower(tokenizer, encoder)], phrase_cache=kept) for kept in (0, 16384))
    rows = scenes(8, 30, side=512).phrases
    every = [phrase for row in rows for phrase in row]

    def published() -> list[Tensor]:
        return [plain.encode_phrases(row, padded=True).pooled for row in rows]

    ours = plain.encode_phrases(every).pooled
    assert (torch.cat(published()) - ours).abs().max() < 1e-4
    seconds = in_turns(
        {
            "published": published,
            "once, trimmed": lambda: plain.encode_phrases(every),
            "kept": lambda: keeping.encode_phrases(every),
        },
        rounds=rounds,
    )
    print(f"phrase features, 8 pictures x 30 phrases ({len(set(every))} distinct), CLIP-L")
    for name, value in seconds.items():
        print(f"  {name:14} {value * 1000:9.1f} ms  {seconds['published'] / value:6.1f} x")


def slots(*, rounds: int) -> None:
    """One slot of SDXL's width with 3 boxes in 30 slots: null tokens one by one, and as one key."""
    site = BlockSite(path="", width=640, heads=10, head_width=64, cross_width=2048, level=1)
    ours = GatedSelfAttention(site, token_width=2048)
    published: Any = GatedSelfAttentionDense(640, 2048, 10, 64)
    published.load_state_dict(ours.state_dict())
    for parameter in (ours.alpha_attn, ours.alpha_dense, published.alpha_attn, published.alpha_dense):
        parameter.data.fill_(0.7)
    for length in (64, 256, 1024):
        hidden, tokens = torch.randn(2, length, 640), torch.randn(2, 4, 2048)
        bias = torch.tensor([0.0, 0.0, 0.0, 27.0]).clamp_min(1).log().expand(2, 1, 1, 4)
        payload, padded = BoxPayload(tokens=tokens, bias={length: bias}), tokens[:, [0, 1, 2, *[3] * 27]]
        with torch.no_grad():
            difference = (ours(hidden, payload) - published(hidden, padded)).abs().max()
            sides = {
                "30 tokens": functools.partial(published, hidden, padded),
                "3 + one null": functools.partial(ours, hidden, payload),
            }
            seconds = in_turns(sides, rounds=5 * rounds)
        ratio = seconds["30 tokens"] / seconds["3 + one null"]
        print(f"slot of width 640, {length:4} positions: {ratio:.2f} x as fast, largest difference {difference:.1e}")


class Step:
    """Forward and backward of the denoiser with its loss, on given latents."""

    def __init__(self, backbone: Backbone, batch: SceneBatch, *, device: str, dtype: torch.dtype) -> None:
        self.backbone, self.batch, self.device, self.dtype = backbone, batch, device, dtype
        side = backbone.resolution // backbone.latent_scale
        generator = torch.Generator().manual_seed(0)
        shape = (len(batch), backbone.latent_channels, side, side)
        self.latents = torch.randn(shape, generator=generator).to(device)
        self.times = torch.randint(1000, (len(batch),), generator=generator).to(device)

    def __call__(self) -> Tensor:
        """The loss, after its gradients are there."""
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = functional.mse_loss(self.predict().float(), self.latents)
        loss.backward()
        return loss.detach()

    def predict(self) -> Tensor:
        """The denoiser's prediction."""
        raise NotImplementedError


class Bare(Step):
    """The backbone alone; its gradient goes to the latents, through the whole UNet as an adapter's does."""

    def predict(self) -> Tensor:
        """Without any box."""
        inputs = Conditioning({})(self.backbone, self.batch, self.batch.captions, tuple(self.latents.shape[-2:]))
        return self.backbone.denoise(self.latents.clone().requires_grad_(), self.times, inputs)


class Ours(Step):
    """Backbone and boxes adapter, as the LightningModule runs them."""

    def attach(self, conditioning: Conditioning) -> Ours:
        """Takes the adapters."""
        self.conditioning = conditioning
        return self

    def predict(self) -> Tensor:
        """With the slots attached for this call alone, so that all sides share the UNet."""
        self.conditioning.attach(self.backbone.unet)
        try:
            inputs = self.conditioning(self.backbone, self.batch, self.batch.captions, tuple(self.latents.shape[-2:]))
            return self.backbone.denoise(self.latents, self.times, inputs)
        finally:
            self.conditioning.detach(self.backbone.unet)


class Published(Step):
    """diffusers' gated UNet, fed picture by picture and padded, as the published trainers feed it."""

    def gate(self, adapter: BoxesAdapter, *, count: int) -> Published:
        """Builds the gated UNet of the same weights."""
        config: dict[str, Any] = {**self.backbone.unet.config, "attention_type": "gated"}
        unet: Any = UNet2DConditionModel.from_config(config)
        self.unet = unet.to(self.device, self.backbone.unet.dtype).requires_grad_(False)
        self.unet.load_state_dict({**self.backbone.unet.state_dict(), **published_tensors(adapter)})
        for name, parameter in self.unet.named_parameters():
            if "fuser" in name or "position_net" in name:
                parameter.data = parameter.data.float()  # trained weights stay in fp32, as on the other side
                parameter.requires_grad_(True)
        self.count = count
        return self

    def predict(self) -> Tensor:
        """With `count` slots for every picture."""
        backbone, rows = self.backbone, self.batch
        with torch.no_grad():
            prompt: Prompt = backbone.encode_captions(rows.captions)
            width = backbone.text_width
            vectors = torch.zeros(len(rows), self.count, width, device=self.device)
            boxes, masks = (
                torch.zeros(len(rows), self.count, 4, device=self.device),
                torch.zeros(len(rows), self.count, device=self.device),
            )
            for row, phrases in enumerate(rows.phrases):
                features = backbone.encode_phrases(phrases, padded=True)
                parts = [features.pooled, features.projected] if backbone.has_pooled else [features.pooled]
                vectors[row, : len(phrases)] = torch.cat(parts, dim=-1)  # type: ignore[arg-type]
                boxes[row, : len(phrases)] = rows.boxes[row, : len(phrases)]
                masks[row, : len(phrases)] = 1
        extra: dict[str, Any] = {}
        if backbone.has_pooled:
            extra["added_cond_kwargs"] = {"text_embeds": prompt.pooled, "time_ids": backbone.size_ids(rows)}
        gligen = {"boxes": boxes, "positive_embeddings": vectors, "masks": masks}
        return self.unet(
            self.latents.to(self.unet.dtype),
            self.times,
            encoder_hidden_states=prompt.tokens,
            cross_attention_kwargs={"gligen": gligen},
            return_dict=False,
            **extra,
        )[0]


def training_step(backbone: Backbone, *, batch: int, rounds: int, device: str, dtype: str, compiled: bool) -> None:
    """A step of the bare denoiser, of diffusers' gated UNet and of ours, with 10 boxes a picture in 30 slots."""
    cast = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    adapter = BoxesAdapter(backbone)
    with torch.no_grad():
        for gate in (p for name, p in adapter.named_parameters() if "alpha" in name):
            gate.fill_(0.5)
    backbone, adapter = backbone.to(device), adapter.to(device)
    rows = scenes(batch, 10, side=backbone.resolution).to(device)
    common: dict[str, Any] = {"device": device, "dtype": cast}
    ours = Ours(backbone, rows, **common).attach(Conditioning({"boxes": adapter}))
    bare, published = Bare(backbone, rows, **common), Published(backbone, rows, **common).gate(adapter, count=30)
    print(f"training step, batch {batch} of {backbone.resolution} px, 10 boxes a picture, {dtype} on {device}")
    if device == "cpu":
        print(f"  loss of ours and published differ by {abs(float(ours()) - float(published())):.1e}")
    with FlopCounterMode(display=False) as counted:
        ours()
    sides: dict[str, Callable[[], Any]] = {"bare": bare, "published": published, "ours": ours}
    if compiled:
        backbone.unet.compile()
    seconds = in_turns(sides, rounds=rounds, device=device)
    peak = next(
        (value for name, value in PEAK_TFLOPS.items() if device == "cuda" and name in torch.cuda.get_device_name()),
        None,
    )
    for name, value in seconds.items():
        print(f"  {name:10} {1 / value:8.3f} steps/s  {seconds['published'] / value:5.2f} x the published")
    if peak:
        print(f"  ours: {counted.get_total_flops() / seconds['ours'] / peak / 1e10:.1f} % of {peak:.0f} TFLOPS")
        for name, run in sides.items():
            torch.cuda.reset_peak_memory_stats()
            run()
            print(f"  {name:10} {torch.cuda.max_memory_allocated() / 2**30:6.1f} GiB")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sdxl", action="store_true", help="SDXL's structure at 512 px in place of the tiny ones")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default=None)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    if asked.sdxl:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backbone = StableDiffusion.from_configs("sdxl", device=device, resolution=512, dtype="bfloat16")
        training_step(
            backbone,
            batch=asked.batch,
            rounds=asked.rounds,
            device=device,
            dtype=asked.dtype or "bf16",
            compiled=asked.compile,
        )
        return
    phrase_features(rounds=asked.rounds)
    slots(rounds=asked.rounds)
    for kind in ("sd15", "sdxl"):
        training_step(
            tiny_backbone(kind),
            batch=asked.batch,
            rounds=asked.rounds,
            device="cpu",
            dtype="fp32",
            compiled=asked.compile,
        )


if __name__ == "__main__":
    main()
