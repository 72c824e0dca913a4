"""What `train.py plan=true` says: what a run would take of memory, work and time on other machines than this one.

One step of the run's own module is done on the meta device, where tensors have shapes and no values: its operations are
counted, and so is what it keeps for the backward pass. Nothing is loaded, nothing is written. Figures of devices are those of
their makers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from datamodules.scene_datamodule import Batch
from datamodules.shard_index import has_shards, read_index
from runtime.build import build_backbone, build_module
from runtime.run_directory import RunError
from scenes import Frame, Relation, Scene, SceneBatch, SceneObject

if TYPE_CHECKING:
    from lightning_modules.scene_diffusion import SceneDiffusion

DAY = 86400
SMALLER = (
    "backbone.dtype=bfloat16, trainer.gradient_checkpointing=true, a smaller trainer.micro_batch and optimizer=adamw_8bit "
    "take less"
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator: operations a second in bfloat16 without sparsity, and bytes of memory.

    Source:
        NVIDIA's data sheets; of the V100, float16.
    """

    peak: float
    memory: float


DEVICES = {
    "v100_32gb": Device(peak=125e12, memory=32e9),
    "rtx4090": Device(peak=165e12, memory=24e9),
    "a6000": Device(peak=155e12, memory=48e9),
    "l40s": Device(peak=362e12, memory=48e9),
    "a100_40gb": Device(peak=312e12, memory=40e9),
    "a100_80gb": Device(peak=312e12, memory=80e9),
    "h100": Device(peak=989e12, memory=80e9),
    "h200": Device(peak=989e12, memory=141e9),
}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one micro-batch takes.

    Attributes:
        flops: operations, a multiplication and an addition being two; forward, backward and the autoencoder.
        saved: bytes that the forward pass keeps for the backward pass.
    """

    flops: int
    saved: int


def planned(cfg: DictConfig) -> tuple[SceneDiffusion, str]:
    """The module of a run on the meta device, and what the run would take.

    Args:
        cfg: the run's configuration; `planning` says on what.

    Returns:
        The module without weights, and the plan in lines.

    Raises:
        RunError: the global batch does not divide among the devices.
    """
    module = skeleton(cfg)
    ranks = cfg.trainer.num_nodes * _devices_of_a_node(cfg)
    micro, accumulate = _micro_batch(cfg, ranks)
    latent, stored = _stored(cfg)
    held = _held(module)
    module.float()  # what is kept is counted in float32, and as half of it where autocast computes
    one = dry_pass(module, micro, objects=cfg.planning.objects, pictures=not latent, half=_is_half(cfg))
    lines = _lines(cfg, module, one, held, ranks=ranks, micro=micro, accumulate=accumulate, stored=stored)
    return module, "\n".join(lines)


def skeleton(cfg: DictConfig) -> SceneDiffusion:
    """The run's module on the meta device; a backbone that has a structure without weights is built from that."""
    cfg = cfg.copy()
    if "skeleton" in cfg.backbone:
        cfg.backbone.skeleton = True
    cfg.trainer.compile = False  # what is compiled computes the same
    cfg.optimizer["_target_"] = "torch.optim.AdamW"  # it is not called, and another's package may not be here
    backbone = build_backbone(cfg).to("meta")
    for tower in backbone.text.each:  # the other kinds look into masks, which hold nothing here
        tower.encoder.set_attn_implementation("eager")
    with torch.device("meta"):
        return build_module(cfg, backbone=backbone, restored=True)


def dry_pass(module: SceneDiffusion, count: int, *, objects: int, pictures: bool, half: bool) -> Pass:
    """One micro-batch through a module on the meta device, forward and backward.

    Args:
        module: on the meta device.
        count: samples.
        objects: objects of each scene, in a ring of relations.
        pictures: the data brings pictures, which the autoencoder encodes.
        half: float32 activations are kept in two bytes, as under autocast.

    Returns:
        Operations and kept bytes.
    """
    batch = _batch(module, count, objects, pictures=pictures)
    fixed = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed and storage._cdata not in kept:
            size = storage.nbytes()
            kept[storage._cdata] = storage, size // 2 if half and tensor.dtype == torch.float32 else size
        return tensor

    counter = FlopCounterMode(display=False)
    module.train()
    # without a vocabulary text is read as bytes, and soon too long: the number of prompt tokens is the same
    with warnings.catch_warnings(), _fused_attention(counter) as attended, counter:
        warnings.filterwarnings("ignore", message="text: ")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = module.losses(batch, list(range(count)), drop=False)
        losses.mean().backward()
    module.zero_grad()
    return Pass(flops=counter.get_total_flops() + attended[0], saved=sum(size for _, size in kept.values()))


def _batch(module: SceneDiffusion, count: int, objects: int, *, pictures: bool) -> Batch:
    backbone = module.backbone
    items = tuple(
        SceneObject(phrase=f"thing {number}", label="thing", box=(0.1, 0.1, 0.5, 0.5)) for number in range(objects)
    )
    ring = tuple(
        Relation(subject=place, predicate="by", object=(place + 1) % objects) for place in range(objects) if objects > 1
    )
    frame = Frame(original=(backbone.resolution, backbone.resolution))
    scene = Scene(id="plan", caption="several things", objects=items, relations=ring, frame=frame)
    cells = backbone.resolution // backbone.latent_scale
    latents = torch.empty(count, backbone.latent_channels, cells, cells, device="meta")
    return Batch(
        torch.empty(count, 3, *frame.original, device="meta") if pictures else None,
        scenes=SceneBatch([scene] * count, device="meta"),
        positions=torch.arange(count),
        latents=None if pictures else latents,
    )


class _FusedAttention(torch.autograd.Function):
    """Attention's shapes: it keeps its inputs, its output and a sum for each row, and never a matrix of logits."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention(counter: FlopCounterMode) -> Iterator[list[int]]:
    """Within the block attention is that of a fused kernel, as on a GPU; gives a list with its operations."""
    plain, found = functional.scaled_dot_product_attention, [0]

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        products = query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        # two products forward; five backward, one of them the logits anew
        found[0] += 2 * products + (5 * products if learns else 0)
        return _FusedAttention.apply(query, key, value)

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield found
    finally:
        functional.scaled_dot_product_attention = plain


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Bytes of frozen weights, those of the denoiser apart."""

    denoiser: int
    others: int


def _held(module: SceneDiffusion) -> _Held:
    """What the frozen weights of a module take, each in its own precision; the average is none of them."""
    unet, average = set(module.backbone.unet.parameters()), _average(module)
    frozen = {p: p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad and p not in average}
    denoiser = sum(size for p, size in frozen.items() if p in unet)
    return _Held(denoiser=denoiser, others=sum(frozen.values()) - denoiser)


def _average(module: SceneDiffusion) -> set[torch.nn.Parameter]:
    return set() if module.average is None else set(module.average.parameters())


def _lines(
    cfg: DictConfig,
    module: SceneDiffusion,
    one: Pass,
    held: _Held,
    *,
    ranks: int,
    micro: int,
    accumulate: int,
    stored: float | None,
) -> list[str]:
    device = DEVICES[cfg.planning.device]
    trained = sum(p.numel() for p in module.trained.parameters())
    average = _average(module)
    frozen = [p for p in module.parameters() if not p.requires_grad and p not in average]
    moments = 2 if "8bit" in cfg.optimizer["_target_"] else 8
    sharing = ranks if cfg.trainer.strategy == "fsdp" else 1  # of the denoiser and the optimizer's state
    parts = {
        "frozen weights": held.others + held.denoiser // sharing,
        "trained weights": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": moments * trained // sharing,
        "average": 4 * trained if average else 0,
        f"activations of {micro}": one.saved,
    }
    total = sum(parts.values()) + cfg.planning.reserve
    told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
    fits = "fits" if total <= device.memory else f"DOES NOT FIT ({SMALLER})"
    step = one.flops * accumulate
    peak = device.peak if _is_half(cfg) else device.peak / 2
    rate = peak * cfg.planning.mfu / step
    days = cfg.trainer.max_steps / rate / DAY
    brought = (
        "no shards here to tell bytes from" if stored is None else f"{rate * cfg.batch_size * stored / 1e6:.1f} MB/s"
    )
    return [
        f"plan       {ranks} x {cfg.planning.device} on {cfg.trainer.num_nodes} nodes, {cfg.trainer.precision}; {micro} samples "
        f"at once x {accumulate} x {ranks} = {cfg.batch_size}",
        f"parameters {trained / 1e6:.1f} M trained, {sum(p.numel() for p in frozen) / 1e6:.1f} M frozen",
        f"memory     {total / 1e9:.1f} of {device.memory / 1e9:.0f} GB on each, {fits}: {told}, "
        f"kept free {cfg.planning.reserve / 1e9:.1f}",
        f"work       {step / 1e12:.2f} TFLOP a step on each, {one.flops / micro / 1e12:.3f} a sample",
        f"time       {rate:.2f} steps/s at MFU {cfg.planning.mfu:g}: {cfg.trainer.max_steps} steps in {days:.2f} days, "
        f"{days * ranks:.1f} GPU-days, {rate * cfg.batch_size * DAY / 1e6:.2f} M samples a day",
        f"loader     {rate * cfg.batch_size:.1f} samples/s, {brought}",
    ]


def _is_half(cfg: DictConfig) -> bool:
    return not str(cfg.trainer.precision).startswith(("32", "64"))


def _devices_of_a_node(cfg: DictConfig) -> int:
    given = cfg.trainer.devices
    if given == "auto":
        return cfg.planning.devices
    return int(given) if isinstance(given, int | str) else len(given)


def _micro_batch(cfg: DictConfig, ranks: int) -> tuple[int, int]:
    """Samples that a rank takes at once, and how often for a step."""
    micro = cfg.trainer.micro_batch
    share, rest = divmod(cfg.batch_size, ranks * (micro or cfg.trainer.accumulate))
    if rest:
        raise RunError(
            f"batch_size={cfg.batch_size}: does not divide by {ranks} devices x {micro or cfg.trainer.accumulate}; set "
            "trainer.micro_batch or planning.devices to what divides it"
        )
    return (micro, share) if micro else (share, cfg.trainer.accumulate)


def shards_of(cfg: DictConfig) -> list[str]:
    """The folders of shards that the run would read; none where one of them is not there yet."""
    given = cfg.data.get("shards")
    folders = [given] if isinstance(given, str) else list(given or ())
    return folders if all(has_shards(folder) for folder in folders) else []


def _stored(cfg: DictConfig) -> tuple[bool, float | None]:
    """Whether the data brings latents, and how many bytes a sample has; None where there are no shards yet."""
    indexes = [read_index(folder) for folder in shards_of(cfg)]
    if not indexes:
        return False, None
    entries = [entry for index in indexes for entry in index["shards"]]
    size, count = sum(entry["bytes"] for entry in entries), sum(entry["count"] for entry in entries)
    return all("latents" in index for index in indexes), size / count
