"""The adapter contract, and `Conditioning`: the adapters of a run seen as one module.

An adapter owns every parameter that a method trains. It is built from a UNet's block sites, never keeps the UNet, and
turns a batch of scenes into what its own modules in the blocks read (a payload) or into other prompt tokens. Methods live
in folders beside this file; how modules reach the blocks lives in `slots`.

Legend: B pictures, T prompt tokens, C token width, h w latent cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from models.conditioning.slots import DenoiserInputs, attach, detach, precision
from models.packing import Tokens
from models.text import PhraseFeatures, Prompt

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from models.backbones.base import Backbone
    from scenes import SceneBatch


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text of a batch, as adapters read it: in the precision of their weights, whatever the encoder's.

    Attributes:
        prompt: the caption as the denoiser takes it, with what the adapters before this one have made of it.
        phrases: encodes M strings, each distinct one once; its options are those of `TextTowers.encode_phrases`.
        tokens: the strings that the adapters have asked for in `Adapter.reading`, all read in one call.
    """

    prompt: Prompt
    phrases: Callable[..., PhraseFeatures]
    tokens: Tokens = field(default_factory=Tokens.nothing)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the frozen text encoder(s) are to read for an adapter and B scenes, all of it in one call.

    Attributes:
        prompts: for each scene a text to read in place of its caption, or None; empty leaves all captions. Such a prompt is
            filled up with its end token's features, in place of what the encoder says about padding.
        tokens: strings whose tokens the adapter takes from `Text.tokens`.
    """

    prompts: Sequence[str | None] = ()
    tokens: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class AdapterOutput:
    """What an adapter adds to the denoiser's inputs; None leaves that part alone.

    Attributes:
        payload: what the adapter's modules in the blocks read, computed once per picture and not once per step.
        prompt: another caption, for methods that act on the prompt.
    """

    payload: Any = None
    prompt: Prompt | None = None


class Adapter(nn.Module, ABC):
    """One conditioning method: `parameters()` is exactly what trains, is averaged and is saved.

    An empty scene is every method's null condition. At initialisation the denoiser's output is that of the bare UNet under the
    text that `Conditioning.read` gives, which is the caption unless the method reads another.
    """

    method: ClassVar[str] = ""
    """Its name in `conf/conditioning`, which files of its weights carry."""

    requires: ClassVar[frozenset[str]] = frozenset()
    """What a source must provide to train it: "boxes", "phrases", "relations", "attributes", "masks"."""

    def slot_modules(self) -> dict[str, nn.Module]:
        """Block path -> module called as module(hidden (B, L, C), payload); empty for methods that act on the prompt."""
        return {}

    def layer_modules(self) -> dict[str, nn.Module]:
        """Path of a linear layer -> module whose output is added to the layer's own; empty for most methods.

        A layer of the UNet, or, by its path in `slots.slot_layers`, of another adapter's module in its blocks. They act whenever
        the layer does, so those on the UNet's own also where a sampler leaves the scene out: they are part of the denoiser.
        """
        return {}

    def gates(self) -> dict[str, float]:
        """Figures that tell whether the method has begun to act, for the log."""
        return {}

    def counts(self) -> dict[str, int]:
        """What did not fit so far, for the log: nothing is left out in silence."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that its weights depend on, as plain values; files of its weights carry them."""
        return {}

    def published(self) -> dict[str, Tensor]:
        """Its parameters by the names and in the shapes of the method's files; they share memory with the adapter."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def read_published(self, path: str) -> dict[str, Tensor]:
        """The tensors, by the names of `published`, of a file or folder that is no adapter file.

        Args:
            path: file, folder or hub name, as the method's authors publish it.

        Returns:
            Tensors on the CPU, in the precision of the file.

        Raises:
            ValueError: nothing there, or nothing that the method knows; a method without a published form knows none.
        """
        there = "is no adapter file" if Path(path).exists() else "does not exist"
        raise ValueError(
            f"conditioning.{self.method}.weights: {path} {there}; give one that convert.py has written from a run"
        )

    def export(self, backbone: Backbone, out: Path, *, form: str) -> None:
        """Writes itself in a form that others read.

        Args:
            backbone: what it belongs to, with weights unless the form is "published".
            out: a folder or file that is not there yet.
            form: name of the form; "published" is a file of its tensors alone, as the method's authors write it.

        Raises:
            ValueError: a form that the method does not have, or a backbone that the form cannot hold.
        """
        raise ValueError(f"form={form}: conditioning.{self.method} has no such form; take form=adapter")

    def losses(self, payload: Any) -> Tensor | None:
        """(B,) losses of its own for what its modules met since `forward`, weighted; None for most methods, and in evaluation."""
        return None

    def reading(self, scenes: SceneBatch) -> Reading:
        """What is to be read for B scenes before `forward`; an empty scene keeps its caption."""
        return Reading()

    @abstractmethod
    def forward(self, scenes: SceneBatch, text: Text, latent_size: tuple[int, int]) -> AdapterOutput:
        """What the denoiser is to read for B scenes whose latents are (h, w) cells."""


class Conditioning(nn.Module):
    """The adapters of a run by name, as one module: the trainable set, the averaged set and the checkpoint.

    Args:
        adapters: name -> adapter, in the order in which they act on the prompt; empty is the bare backbone.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(adapters)

    @property
    def named(self) -> dict[str, Adapter]:
        """The adapters in order, by their own type: `nn.ModuleDict` knows its items as modules only."""
        return cast(dict[str, Adapter], dict(self.adapters.items()))

    @property
    def requires(self) -> frozenset[str]:
        """What a source must provide for every adapter to train."""
        return frozenset().union(*(adapter.requires for adapter in self.named.values()))

    def attach(self, unet: UNet2DConditionModel) -> None:
        """Puts the adapters' modules into the slots of the UNet and beside its layers."""
        attach(
            unet,
            {name: adapter.slot_modules() for name, adapter in self.named.items()},
            {name: adapter.layer_modules() for name, adapter in self.named.items()},
        )

    @staticmethod
    def detach(unet: UNet2DConditionModel) -> None:
        """Restores the UNet."""
        detach(unet)

    def forward(
        self,
        backbone: Backbone,
        scenes: SceneBatch,
        captions: Sequence[str],
        latent_size: tuple[int, int],
        *,
        size: tuple[int, int] | None = None,
        kept: Tensor | None = None,
        seen: Mapping[str, SceneBatch] | None = None,
    ) -> DenoiserInputs:
        """Everything that the denoiser takes for B scenes under B captions.

        Args:
            backbone: encodes captions and phrases, and knows its size ids.
            scenes: B scenes.
            captions: B captions.
            latent_size: (h, w) cells.
            size: (height, width) px to assume for scenes without a frame, as in sampling; None refuses them where the
                backbone takes size ids.
            kept: (B,) bool, False where a caption becomes zero tokens and a zero pooled vector; a text that an adapter
                reads in its place stays.
            seen: B scenes for an adapter that sees others, by its name, as where the scene is dropped for it alone.

        Returns:
            The prompt that the adapters left (B, T, text_width), pooled (B, P) and size ids (B, 6) where the backbone
            takes them, and the payload of each adapter that gave one, by its name.
        """
        own = {name: (seen or {}).get(name, scenes) for name in self.named}
        prompt, tokens = self.read(backbone, own, captions, kept=kept)
        slots: dict[str, Any] = {}
        for name, adapter in self.named.items():
            text = _in_precision(precision(adapter), prompt, backbone.encode_phrases, tokens)
            output = adapter(own[name], text, latent_size)
            prompt = output.prompt or prompt
            if output.payload is not None:
                slots[name] = output.payload
        return DenoiserInputs(
            prompt=prompt.tokens, pooled=prompt.pooled, size_ids=backbone.size_ids(scenes, size=size), slots=slots
        )

    def losses(self, inputs: DenoiserInputs) -> dict[str, Tensor]:
        """(B,) losses of the adapters that have one of their own, by name, after the denoiser has run on `inputs`."""
        found = {name: self.named[name].losses(payload) for name, payload in inputs.slots.items()}
        return {name: losses for name, losses in found.items() if losses is not None}

    def read(
        self,
        backbone: Backbone,
        seen: Mapping[str, SceneBatch],
        captions: Sequence[str],
        *,
        kept: Tensor | None = None,
    ) -> tuple[Prompt, Tokens]:
        """What the frozen encoder(s) read, before any adapter acts: with closed gates it is what the denoiser takes.

        Args:
            backbone: the encoder(s).
            seen: adapter's name -> B scenes that it sees.
            captions: B captions.
            kept: as in `forward`.

        Returns:
            The prompt, and the strings that adapters have asked for.

        Raises:
            ValueError: two adapters that would each read another text in the same caption's place.
        """
        readings = {name: adapter.reading(seen[name]) for name, adapter in self.named.items()}
        texts = _texts(readings, len(captions))
        own = [text for text in texts if text is not None]
        tokens = backbone.read([*own, *(s for each in readings.values() for s in each.tokens)], once=frozenset(own))
        if not own:
            prompt = backbone.encode_captions(captions)
        else:
            prompt = Prompt(*tokens.padded(own, length=backbone.text.max_length))
            if len(own) < len(texts):
                plain = backbone.encode_captions([c for c, text in zip(captions, texts, strict=True) if text is None])
                prompt = _merged(prompt, plain, [text is not None for text in texts])
        if kept is None:
            return prompt, tokens
        return prompt.blanked(kept.cpu() | torch.tensor([text is not None for text in texts])), tokens


def _in_precision(
    dtype: torch.dtype | None, prompt: Prompt, phrases: Callable[..., PhraseFeatures], tokens: Tokens
) -> Text:
    """The text of a batch in a precision; None leaves it in the encoder's."""
    if dtype is None:
        return Text(prompt=prompt, phrases=phrases, tokens=tokens)

    def encode(*strings: Any, **how: Any) -> PhraseFeatures:
        return phrases(*strings, **how).to(dtype)

    return Text(prompt=prompt.to(dtype), phrases=encode, tokens=tokens.to(dtype))


def _texts(readings: Mapping[str, Reading], count: int) -> list[str | None]:
    """For each of B scenes the text that is read in place of its caption."""
    names = [name for name, reading in readings.items() if any(text is not None for text in reading.prompts)]
    if len(names) > 1:
        raise ValueError(
            f"conditioning: {' and '.join(names)} each read another text in the caption's place; take one of them, or let "
            "the others read the caption"
        )
    return list(readings[names[0]].prompts) if names else [None] * count


def _merged(own: Prompt, plain: Prompt, is_own: Sequence[bool]) -> Prompt:
    """B prompts of two parts, each part in the order of its scenes."""
    places, numbers = [], [0, sum(is_own)]
    for one in is_own:
        places.append(numbers[not one])
        numbers[not one] += 1
    index = torch.tensor(places, device=plain.tokens.device)
    tokens = torch.cat([own.tokens, plain.tokens])[index]
    if own.pooled is None or plain.pooled is None:
        return Prompt(tokens)
    return Prompt(tokens, torch.cat([own.pooled, plain.pooled])[index])


def gate_figures(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensors by name as plain numbers: the mean of their magnitudes."""
    return {name: float(value.detach().abs().mean()) for name, value in values.items()}
