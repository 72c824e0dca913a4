"""What a backbone is: images to latents and back, text to features, one call of the denoiser.

SD and SDXL differ here only by data (`has_pooled`, `has_size_ids`). Noise schedules are given as data too: corrupting
latents and sampling live elsewhere, and so does everything about adapters but the slots that `denoise` passes on.

Legend: B pictures, H W pixels, C latent channels, h w latent cells (H / latent_scale), T tokens, P pooled width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, UNet2DConditionModel
from torch import Tensor, nn

from models.packing import Tokens
from models.text import PhraseFeatures, Prompt, TextTowers

if TYPE_CHECKING:
    from models.conditioning.slots import DenoiserInputs
    from scenes.scene import SceneBatch

EXACT = -30.0
"""Log-variance of a latent that its picture decides wholly; autoencoders' own are cut there."""

INPAINTS = (
    "this UNet was trained to inpaint and takes a picture beside its latents; "
    "sample with a picture (inpaint=FILE), or take the weights for generation"
)


def config_of(part: ConfigMixin) -> Any:
    """The config of a diffusers part, whose entries are attributes; diffusers types it as a plain dict."""
    return part.config


class Backbone(nn.Module, ABC):
    """A diffusion model: frozen unless a caller asks for gradients.

    Args:
        unet: the denoiser.
        text: text encoder(s) with their tokenizers.
        scheduler_config: config of a diffusers noise scheduler, as published with the weights.
        latent_scale: pixels per latent cell.
        resolution: side in pixels that the weights were trained at.
        size_ids: the six numbers of `size_ids` for every scene, in place of its own; None takes its own. A `Sampler`
            has a setting of its own.

    Raises:
        ValueError: size ids that are no such numbers or that the denoiser takes none of, a UNet whose text or pooled input does
            not fit the text encoder(s), or one that wants other inputs.
    """

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        text: TextTowers,
        scheduler_config: dict[str, Any],
        latent_scale: int,
        resolution: int,
        size_ids: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_fit(unet, text)
        self.unet = unet
        self.text = text
        self.scheduler_config = dict(scheduler_config)
        self.latent_channels: int = config_of(unet).out_channels
        self.latent_scale = latent_scale
        self.resolution = resolution
        self._size_ids = check_size_ids("backbone", size_ids, is_taken=self.has_size_ids)

    def freeze(self) -> None:
        """Stops all gradients and puts every part in evaluation mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """As `nn.Module.train`, but parts without a trainable parameter stay in evaluation mode."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return self.unet.device

    @property
    def has_pooled(self) -> bool:
        """Whether the denoiser takes a pooled caption vector."""
        return config_of(self.unet).addition_embed_type == "text_time"

    @property
    def has_size_ids(self) -> bool:
        """Whether the denoiser takes the six size ids."""
        return config_of(self.unet).addition_embed_type == "text_time"

    @property
    def text_width(self) -> int:
        """Width of a prompt token."""
        return config_of(self.unet).cross_attention_dim

    @property
    def phrase_width(self) -> int:
        """Width of a phrase token (`PhraseFeatures.last_hidden`), summed over the towers."""
        return self.text.width

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser was trained to inpaint: it takes a picture's latents and a mask beside the noised latents."""
        return config_of(self.unet).in_channels == 2 * self.latent_channels + 1

    def encode_images(
        self, images: Tensor, *, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1], at the scale the denoiser works at.

        Args:
            images: float pictures; H and W multiples of `latent_scale`.
            generator: draws a sample of the posterior, one generator for all or one a picture; None gives its mode.

        Returns:
            (B, C, h, w) latents, h = H / latent_scale and w = W / latent_scale.

        Raises:
            ValueError: another range, shape or size.
        """
        self._check_images(images)
        return self._encode(images, generator)

    def encode_moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, h, w) of the distribution that `encode_images` takes the latents of `images` from.

        Args:
            images: (B, 3, H, W) float pictures in [-1, 1]; H and W multiples of `latent_scale`.

        Returns:
            (B, 2C, h, w) float: C channels of the mean, which is the mode, then C of the logarithm of the variance, both of
            latents at the scale the denoiser works at.

        Raises:
            ValueError: another range, shape or size.
        """
        self._check_images(images)
        return self._moments(images)

    def _check_images(self, images: Tensor) -> None:
        """Refuses pictures of another range, shape or size."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images: {tuple(images.shape)} {images.dtype} is not (B, 3, H, W) float; stack RGB pictures and scale to [-1, 1]"
            )
        height, width = images.shape[-2:]
        if height % self.latent_scale or width % self.latent_scale:
            raise ValueError(
                f"images: {height} x {width} px is not a multiple of latent_scale {self.latent_scale}; resize or crop them"
            )
        low, high = (float(bound) for bound in torch.aminmax(images.detach())) if not images.is_meta else (0.0, 0.0)
        if not (low >= -1.001 and high <= 1.001):  # NaN fails too; the slack is what fp16 and resampling need
            raise ValueError(f"images: range [{low:.4g}, {high:.4g}] is outside [-1, 1]; give uint8 / 127.5 - 1")

    @property
    def autoencoder(self) -> nn.Module | None:
        """The part that pictures are encoded with, which is all that `encode_moments` needs on a device; None for none."""
        return None

    @property
    def latent_factor(self) -> float:
        """What `encode_images` multiplies the autoencoder's output by; with the shape it tells autoencoders apart."""
        return 1.0

    def check_latents(self, shape: tuple[int, ...], *, factor: float | None = None) -> None:
        """Refuses latents that this backbone did not make.

        Args:
            shape: (C, h, w) of a latent.
            factor: the scaling factor that they are multiplied by, where it is known.

        Raises:
            ValueError: another number of channels, another size than `resolution`, or another autoencoder's factor.
        """
        if shape[0] != self.latent_channels:
            raise ValueError(
                f"latents: {shape[0]} channels, this backbone has {self.latent_channels}; "
                "give latents of this backbone's autoencoder, or pictures"
            )
        side = self.resolution // self.latent_scale
        if tuple(shape[1:]) != (side, side):
            raise ValueError(
                f"latents: {' x '.join(map(str, shape[1:]))} cells, backbone.resolution={self.resolution} makes "
                f"{side} x {side}; set backbone.resolution={shape[1] * self.latent_scale} or give other shards"
            )
        if factor is not None and abs(factor - self.latent_factor) > 1e-6:
            raise ValueError(
                f"latents: multiplied by {factor:g}, this backbone's autoencoder by {self.latent_factor:g}, so that "
                "another one made them; give latents of this backbone's autoencoder, or pictures"
            )

    @abstractmethod
    def _encode(self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        """Latents of checked images."""

    def _moments(self, images: Tensor) -> Tensor:
        """Moments of checked images; here of latents that the picture decides wholly."""
        latents = self._encode(images, None)
        return torch.cat([latents, torch.full_like(latents, EXACT)], dim=1)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], clamped, of latents (B, C, h, w)."""

    def encode_captions(self, captions: Sequence[str]) -> Prompt:
        """Captions as the denoiser takes them: tokens (B, T, text_width) and, where it has one, pooled (B, P)."""
        return self.text.encode_captions(captions)

    def encode_phrases(self, phrases: Sequence[str], *, padded: bool = False, masked: bool = False) -> PhraseFeatures:
        """Features of M strings, each distinct one encoded once; trimmed to the longest unless `padded` or `masked`."""
        return self.text.encode_phrases(phrases, padded=padded, masked=masked)

    def read(self, strings: Sequence[str], *, once: Collection[str] = ()) -> Tokens:
        """Strings read as captions are, without padding, in one call; those named in `once` are not kept for later."""
        return self.text.read(strings, once=once)

    def denoise(self, latents: Tensor, timesteps: Tensor, inputs: DenoiserInputs) -> Tensor:
        """The denoiser's prediction (B, C, h, w) in the dtype of `latents`.

        Args:
            latents: (B, C, h, w) noised latents.
            timesteps: (B,) in the units of the noise schedule; fractions welcome.
            inputs: prompt tokens, pooled vector and size ids where the backbone has them, the adapters' payloads, and what
                an inpainting UNet takes beside the latents.

        Returns:
            (B, C, h, w) what the noise schedule's `prediction_type` names: noise, velocity or clean latents.

        Raises:
            ValueError: a pooled vector, size ids or inpainting channels that the denoiser needs are missing.
        """
        dtype = self.unet.dtype
        noised = latents
        if self.inpaints:
            if inputs.inpainting is None:
                raise ValueError(f"inputs.inpainting: None, but {INPAINTS}")
            noised = torch.cat([latents, inputs.inpainting.to(latents.dtype)], dim=1)
        extra: dict[str, Any] = {}
        if self.has_pooled:
            if inputs.pooled is None or inputs.size_ids is None:
                missing = "pooled" if inputs.pooled is None else "size_ids"
                raise ValueError(
                    f"inputs.{missing}: None, but this backbone needs it; take encode_captions and size_ids"
                )
            # size ids stay fp32: half precision is exact to 2048 only, and pictures are larger
            extra["added_cond_kwargs"] = {
                "text_embeds": inputs.pooled.to(dtype),
                "time_ids": inputs.size_ids.float(),
            }
        if inputs.slots:
            extra["cross_attention_kwargs"] = {"gligen": inputs.slots}
        prediction = self.unet(
            noised.to(dtype), timesteps, encoder_hidden_states=inputs.prompt.to(dtype), return_dict=False, **extra
        )[0]
        return prediction.to(latents.dtype)

    def size_ids(self, scenes: SceneBatch, *, size: tuple[int, int] | None = None) -> Tensor | None:
        """Size ids (B, 6) float32 px: original height and width, crop top and left, target height and width.

        The crop's corner is counted, as in SDXL's training, in pixels of the resized picture, before it is cropped.

        Args:
            scenes: B scenes with frames; where the backbone was built with size ids, they are every scene's.
            size: (height, width) px to assume, uncropped, for scenes without a frame, as in sampling.

        Returns:
            (B, 6) float32 on the denoiser's device; None for a backbone that takes no size ids.

        Raises:
            ValueError: a scene without a frame, and no `size`.
        """
        if not self.has_size_ids:
            return None
        if self._size_ids is not None:
            return torch.tensor([self._size_ids] * len(scenes), dtype=torch.float32, device=self.device).reshape(-1, 6)
        rows = []
        for scene in scenes.scenes:
            if scene.frame is None:
                if size is None:
                    raise ValueError(
                        f"scene {scene.id}: frame: missing, but this backbone takes size ids; give frame or size"
                    )
                rows.append((*size, 0, 0, *size))
                continue
            top, left, height, width = scene.frame.crop
            target = scene.frame.target
            corner = (round(top * target[0] / height), round(left * target[1] / width))
            rows.append((*scene.frame.original, *corner, *target))
        return torch.tensor(rows, dtype=torch.float32, device=self.device).reshape(-1, 6)


def check_size_ids(setting: str, size_ids: Sequence[float] | None, *, is_taken: bool = True) -> list[float] | None:
    """Size ids that stand in for a scene's own, checked.

    Args:
        setting: the node that they are set in, for the message.
        size_ids: six numbers of pixels; None for each scene's own.
        is_taken: whether the denoiser takes any.

    Returns:
        They as a list.

    Raises:
        ValueError: not six numbers from 0 up, or for a denoiser that takes none.
    """
    if size_ids is None:
        return None
    if not is_taken:
        raise ValueError(
            f"{setting}.size_ids: {list(size_ids)}, but this backbone takes none; leave {setting}.size_ids as it is by default"
        )
    if len(size_ids) != 6 or not all(0 <= number < math.inf for number in size_ids):
        raise ValueError(
            f"{setting}.size_ids: {list(size_ids)} are not six numbers of pixels; give original height and width, crop top and "
            "left, target height and width, or leave it as it is by default"
        )
    return list(size_ids)


def _check_fit(unet: UNet2DConditionModel, text: TextTowers) -> None:
    config = config_of(unet)
    if config.addition_embed_type not in (None, "text_time"):
        raise ValueError(
            f"unet.addition_embed_type: {config.addition_embed_type!r} is not supported; take a UNet with text_time or none"
        )
    if config.cross_attention_dim != text.width:
        raise ValueError(
            f"unet.cross_attention_dim: {config.cross_attention_dim} is not the text width {text.width}; "
            "take the text encoder(s) that belong to this UNet"
        )
    if config.addition_embed_type is None:
        return
    pooled = next((tower.projection_width for tower in reversed(text.each) if tower.projection_width), None)
    wanted = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    if pooled != wanted or not text.caption_pooled:
        raise ValueError(
            f"unet.projection_class_embeddings_input_dim: the UNet wants a pooled caption of width {wanted}, the text "
            f"encoders give {pooled if text.caption_pooled else None}; take the text encoder(s) that belong to this UNet"
        )
