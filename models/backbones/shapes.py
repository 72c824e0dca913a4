"""The shapes backbone: a small text-to-image model of the project's own, on pixels, with weights kept in the repository.

It is built from the same classes as SD (a diffusers UNet, a CLIP text encoder and tokenizer), only small, so that
everything which works on it works on SD. Training it lives elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from models.backbones.base import Backbone
from models.conditioning.slots import DenoiserInputs
from models.text import TextTower, TextTowers, word_tokenizer
from scenes.json_form import parse_mapping

REPOSITORY = Path(__file__).parents[2]

# What weights are tied to in a noise schedule; the rest of its config is about sampling.
TRAINED_SCHEDULE = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "rescale_betas_zero_snr",
)


class ShapesBackbone(Backbone):
    """A pixel-space diffusion model whose latents are the picture, folded by `patch`.

    Folding (pixel unshuffle) only moves values, so it is its own exact, orthogonal "VAE": latent_scale = patch and
    latent_channels = 3 * patch**2. The UNet is told the place of each cell in two further channels (CoordConv, Liu et al.
    2018): SD's deep UNets know places by their padding, this shallow one hardly does, and an adapter that puts objects
    into boxes has to (docs/decisions/0007-shapes-coordinates.md).

    Args:
        unet_config: arguments of `UNet2DConditionModel`; channels, sample size and text width are filled in.
        text_config: arguments of `CLIPTextConfig`; vocabulary, positions and special tokens are filled in.
        patch: pixels per side folded into one latent cell.
        words: words that are one token each; their order fixes the token ids.
        max_length: tokens of a padded caption.
        scheduler: noise schedule, as a diffusers scheduler config.
        weights: file written by `save_weights`, a relative path also from the repository's root; None starts at random.
        resolution: side in pixels that the weights are trained at.

    Raises:
        ValueError: settings that do not fit together, or weights that do not fit the settings.
    """

    def __init__(
        self,
        *,
        unet_config: Mapping[str, Any],
        text_config: Mapping[str, Any],
        patch: int,
        words: Sequence[str],
        max_length: int,
        scheduler: Mapping[str, Any],
        weights: str | Path | None = None,
        resolution: int = 32,
    ) -> None:
        if patch not in (1, 2) or resolution % patch:
            raise ValueError(
                f"backbone.patch: {patch} does not fold {resolution} px; take 1 or 2 and an even resolution"
            )
        tokenizer = word_tokenizer(words, max_length=max_length)
        derived_text: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        _refuse_derived("text_config", text_config, derived_text)
        encoder = CLIPTextModel(CLIPTextConfig(**text_config, **derived_text))
        derived_unet: dict[str, Any] = {
            "in_channels": 3 * patch**2 + 2,  # two channels say where a cell lies
            "out_channels": 3 * patch**2,
            "sample_size": resolution // patch,
            "cross_attention_dim": encoder.config.hidden_size,
        }
        _refuse_derived("unet_config", unet_config, derived_unet)
        super().__init__(
            unet=UNet2DConditionModel(**unet_config, **derived_unet),
            text=TextTowers([TextTower(tokenizer, encoder)]),
            scheduler_config=dict(scheduler),
            latent_scale=patch,
            resolution=resolution,
        )
        self._settings = {
            "unet_config": dict(unet_config),
            "text_config": dict(text_config),
            "patch": patch,
            "words": list(words),
            "max_length": max_length,
            "scheduler": {key: scheduler[key] for key in TRAINED_SCHEDULE if key in scheduler},
        }
        if weights is not None:
            self.load_weights(weights)
        self.freeze()

    def _encode(self, images: Tensor, generator: object) -> Tensor:
        return functional.pixel_unshuffle(images, self.latent_scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], clamped, of latents (B, 3 * patch**2, h, w)."""
        return functional.pixel_shuffle(latents, self.latent_scale).clamp(-1, 1)

    def denoise(self, latents: Tensor, timesteps: Tensor, inputs: DenoiserInputs) -> Tensor:
        """As in `Backbone`, with the place of each cell beside its latents.

        Args:
            latents: (B, C, h, w) noised latents.
            timesteps: (B,) in the units of the noise schedule.
            inputs: prompt tokens and the adapters' payloads.

        Returns:
            (B, C, h, w) the velocity.
        """
        return super().denoise(torch.cat([latents, places(latents)], dim=1), timesteps, inputs)

    def save_weights(self, path: str | Path, *, recipe: str, dtype: torch.dtype = torch.float32) -> None:
        """Writes one safetensors file with keys `unet.*` and `text.*`.

        Args:
            path: file to write.
            recipe: hash of the data recipe that the weights were trained on; kept in the file's metadata.
            dtype: precision on disk.
        """
        tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self._weights().items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(path), metadata={"config": json.dumps(self._settings), "recipe": recipe})

    def load_weights(self, path: str | Path) -> None:
        """Reads what `save_weights` wrote, strictly.

        Args:
            path: the file; a relative one is looked for in the working directory, then in the repository's root.

        Raises:
            ValueError: no such file, or weights of other settings, other keys or other shapes; each is named.
        """
        path = Path(path)
        if not path.is_absolute() and not path.is_file():
            path = REPOSITORY / path
        if not path.is_file():
            raise ValueError(f"backbone.weights: {path} does not exist; give a file or backbone.weights=null")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"backbone.weights: {path} is not a safetensors file ({error})") from error
        self._check_settings(path, parse_mapping(metadata.get("config", "{}"), f"backbone.weights: {path}: its config"))
        own = self._weights()
        missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(
                f"backbone.weights: {path}: missing keys {missing}, unexpected keys {unexpected}; take weights of this backbone"
            )
        for key, value in own.items():
            if stored[key].shape != value.shape:
                raise ValueError(
                    f"backbone.weights: {path}: {key} is {tuple(stored[key].shape)}, this backbone has {tuple(value.shape)}; "
                    "take weights of this backbone"
                )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(stored[key])

    def _check_settings(self, path: str | Path, stored: dict[str, Any]) -> None:
        """Refuses weights of other settings, also where every shape fits (another order of words, another target)."""
        own = json.loads(json.dumps(self._settings))
        for name in own:
            if stored.get(name) != own[name]:
                raise ValueError(
                    f"backbone.{name}: {_difference(own[name], stored.get(name))} in the weights {path}; "
                    "set it as there or take other weights"
                )

    def _weights(self) -> dict[str, Tensor]:
        """Live tensors by their key on disk."""
        return {
            **{f"unet.{key}": value for key, value in self.unet.state_dict().items()},
            **{f"text.{key}": value for key, value in self.text.each[0].encoder.state_dict().items()},
        }


def places(latents: Tensor) -> Tensor:
    """Row and column (B, 2, h, w) of the cells of (B, C, h, w) latents: their centres, in (-1, 1)."""
    rows, columns = (
        (torch.arange(count, device=latents.device, dtype=latents.dtype) * 2 + 1) / count - 1
        for count in latents.shape[-2:]
    )
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return grid.expand(len(latents), -1, -1, -1)


def _refuse_derived(name: str, given: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    both = sorted(given.keys() & derived.keys())
    if both:
        raise ValueError(f"backbone.{name}.{both[0]}: {given[both[0]]} is derived from other settings; leave it out")


def _difference(own: Any, stored: Any) -> str:
    if isinstance(own, dict) and isinstance(stored, dict):
        key = next(key for key in sorted(own.keys() | stored.keys()) if own.get(key) != stored.get(key))
        return f"{key} is {own.get(key)} here but {stored.get(key)}"
    return f"{own} here but {stored}"
