"""The one file that knows diffusers' internals: where an adapter's modules act inside a UNet that does not own them.

`BasicTransformerBlock` calls `self.fuser(hidden, objs)` between self- and cross-attention whenever a `gligen` payload is
given, and the UNet passes that payload through `self.position_net` first; neither asks what the attribute is. So a plain
callable is set there: the UNet *borrows* it, PyTorch does not register it, its keys stay the pretrained ones. The linear layers
of its attention are borrowed in the same spirit: a hook adds what an adapter's module makes of a layer's input. What the modules
compute lives with the adapters.

Legend: B pictures, L image tokens of a block (its height x width), C width of the block, T prompt tokens, P pooled width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DenoiserInputs:
    """Everything that the denoiser takes beside latents and time.

    Attributes:
        prompt: (B, T, C) caption tokens, an adapter's own appended or added where it acts on the prompt.
        pooled: (B, P) pooled caption vector; None for a backbone that takes none.
        size_ids: (B, 6) fp32 original size, crop corner and target size, each as (height, width); None as above.
        slots: adapter name -> payload for its modules in the blocks; empty gives the bare UNet.
        inpainting: (B, C + 1, h, w) further input channels of a UNet that was trained to inpaint: the latents of the kept
            part, zero elsewhere, and 1 where a cell is kept; None for any other UNet.
    """

    prompt: Tensor
    pooled: Tensor | None = None
    size_ids: Tensor | None = None
    slots: dict[str, Any] = field(default_factory=dict)
    inpainting: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BlockSite:
    """One transformer block of a UNet.

    Attributes:
        path: its module path, as in `unet.get_submodule(path)`.
        width: C of its hidden states.
        heads: attention heads of its self-attention.
        head_width: width of one head.
        cross_width: width of the prompt tokens that it attends to.
        level: how often the latent is halved before this block; its tokens are ceil(h / 2**level) x ceil(w / 2**level).
    """

    path: str
    width: int
    heads: int
    head_width: int
    cross_width: int
    level: int


class Slot:
    """What a block calls as its `fuser`: the modules of every adapter that has a payload, in order of their names.

    A plain class on purpose: as an `nn.Module` it would register the adapters' weights inside the UNet.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(sorted(modules.items()))

    def __call__(self, hidden: Tensor, payloads: Mapping[str, Any]) -> Tensor:
        """Hidden states (B, L, C) after the modules whose adapter has a payload."""
        for name, module in self.modules.items():
            if name in payloads:
                hidden = _in_own_precision(module, hidden, payloads[name])
        return hidden


def precision(module: nn.Module) -> torch.dtype | None:
    """The precision of a module's weights; None for one without any."""
    return next((parameter.dtype for parameter in module.parameters()), None)


def _in_own_precision(module: nn.Module, hidden: Tensor, payload: Any) -> Tensor:
    """What a module makes of hidden states; it computes in the precision of its weights, or in autocast's.

    It is given back in the precision of the hidden states, so that the UNet computes in the one that it would have without.
    """
    dtype = precision(module)
    # autocast knows no meta device
    if dtype is None or (not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type)):
        dtype = hidden.dtype
    return module(hidden.to(dtype), payload).to(hidden.dtype)


def _payloads(**payloads: Any) -> dict[str, Any]:
    """Stands in for the UNet's `position_net`: payloads go to the blocks as they are, computed once per picture."""
    return payloads


class Beside:
    """What a linear layer calls after itself: adds what an adapter's module makes of the layer's own input.

    Args:
        module: called as module(hidden (..., in)) -> (..., out).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, _layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output (..., out) with the module's added."""
        return output + self.module(given[0]).to(output.dtype)


def block_sites(unet: UNet2DConditionModel, blocks: Iterable[str] | str = "all") -> list[BlockSite]:
    """The transformer blocks of a UNet, in the order in which they run.

    Args:
        unet: any UNet; its weights are not read, so it may live on the meta device.
        blocks: "all", or parts of the UNet to choose from: "down", "mid", "up".

    Returns:
        One site for each transformer block: its path, its widths, its heads and its level.

    Raises:
        ValueError: a part that does not exist, or a choice that leaves no block.
    """
    parts = ("down", "mid", "up") if blocks == "all" else tuple([blocks] if isinstance(blocks, str) else blocks)
    unknown = [part for part in parts if part not in ("down", "mid", "up")]
    if unknown:
        raise ValueError(f"blocks: {unknown[0]!r} is no part of a UNet; take all, or some of down, mid, up")
    sites = []
    for prefix in ("down_blocks", "mid_block", "up_blocks"):
        if prefix.split("_")[0] not in parts:
            continue
        for path, module in unet.named_modules():
            if path.startswith(prefix) and isinstance(module, BasicTransformerBlock):
                sites.append(_site(unet, path, module))
    if not sites:
        raise ValueError(f"blocks: {blocks!r} names no transformer block of this UNet; take blocks: all")
    return sites


def _site(unet: UNet2DConditionModel, path: str, block: BasicTransformerBlock) -> BlockSite:
    last = len(unet.down_blocks) - 1
    part, *rest = path.split(".")
    level = last if part == "mid_block" else int(rest[0]) if part == "down_blocks" else last - int(rest[0])
    attention = block.attn1
    return BlockSite(
        path=path,
        width=attention.query_dim,
        heads=attention.heads,
        head_width=attention.inner_dim // attention.heads,
        cross_width=block.attn2.cross_attention_dim if block.attn2 is not None else 0,
        level=level,
    )


def attention_layers(unet: UNet2DConditionModel, blocks: Iterable[str] | str = "all") -> dict[str, tuple[int, int]]:
    """The linear layers of a UNet's own attention, self and cross: queries, keys, values and output.

    Args:
        unet: as in `block_sites`.
        blocks: as in `block_sites`.

    Returns:
        Path of a layer -> its widths (in, out), in the order in which they run.
    """
    layers = {}
    for site in block_sites(unet, blocks):
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                path = f"{site.path}.{attention}.{name}"
                layer = cast(nn.Linear, unet.get_submodule(path))
                layers[path] = layer.in_features, layer.out_features
    return layers


def slot_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """The linear layers of an adapter's modules, under the paths that they would have in a UNet that owned them.

    Args:
        modules: block path -> module, as `Adapter.slot_modules` gives them.

    Returns:
        `<block path>.fuser.<name>` -> layer, in the order in which the blocks run.
    """
    return {
        f"{path}.fuser.{name}": layer
        for path, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def attach(
    unet: UNet2DConditionModel,
    modules: Mapping[str, Mapping[str, nn.Module]],
    beside: Mapping[str, Mapping[str, nn.Module]] | None = None,
) -> None:
    """Puts adapters' modules into the slots of a UNet and beside its layers; checks first, then sets.

    Args:
        unet: a UNet with free slots.
        modules: adapter name -> block path -> module, called as module(hidden (B, L, C), payload) -> (B, L, C).
        beside: adapter name -> path of a linear layer, of the UNet or of a module in its slots (`slot_layers`) -> module, called
            as module(hidden (..., in)) -> (..., out) whenever the layer is, also where there is no payload.

    Raises:
        ValueError: a slot that is taken (a UNet built with attention_type="gated", or one attached before), or a path
            that is no transformer block or no linear layer.
    """
    linear = {path: m for path, m in unet.named_modules() if isinstance(m, nn.Linear)}
    for at in modules.values():
        linear |= slot_layers(at)
    for name, at in (beside or {}).items():
        for path in at:
            if path not in linear:
                raise ValueError(
                    f"{name}: {path} is no linear layer of this UNet or in its slots; take paths from attention_layers(unet) or "
                    "slot_layers(modules)"
                )
    blocks = {path: m for path, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}
    for name, at in modules.items():
        for path in at:
            if path not in blocks:
                raise ValueError(
                    f"{name}: {path} is no transformer block of this UNet; take paths from block_sites(unet)"
                )
    taken = [path for path, block in blocks.items() if hasattr(block, "fuser")]
    if taken or hasattr(unet, "position_net"):
        raise ValueError(
            f"unet: the slot of {taken[0] if taken else 'position_net'} is taken; detach(unet) first, or load the UNet "
            'without attention_type="gated"'
        )
    cast(Any, unet).position_net = _payloads  # to torch's types an attribute is a tensor or a module
    for (
        path,
        block,
    ) in blocks.items():  # every block calls its fuser once payloads are given, so each gets one
        cast(Any, block).fuser = Slot({name: at[path] for name, at in modules.items() if path in at})
    for at in (beside or {}).values():
        for path, module in at.items():
            linear[path].register_forward_hook(Beside(module))


def detach(unet: UNet2DConditionModel) -> None:
    """Restores the UNet exactly; one without borrowed slots is left as it is."""
    if unet.__dict__.get("position_net") is _payloads:
        del unet.position_net
    for module in unet.modules():
        slot = module.__dict__.get("fuser") if isinstance(module, BasicTransformerBlock) else None
        if isinstance(slot, Slot):
            for borrowed in slot.modules.values():
                _without_hooks(borrowed)
            del module.fuser
    _without_hooks(unet)


def _without_hooks(module: nn.Module) -> None:
    """Takes what was put beside a module's layers away."""
    for layer in module.modules():
        for key in [key for key, hook in layer._forward_hooks.items() if isinstance(hook, Beside)]:
            del layer._forward_hooks[key]
