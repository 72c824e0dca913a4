"""Stable Diffusion, every version whose denoiser is a diffusers UNet: SD 1.x, SD 2.x, SDXL and what was tuned from them.

One class serves all: how many text encoders there are, which layer captions are read from, whether there is a pooled
vector and size ids follows from the parts. `components/` holds the published configs of each part, so that the structure
can be built without weights. Training and sampling live elsewhere.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from files.quiet import quiet_libraries
from models.backbones.base import Backbone, config_of
from models.text import TextTower, TextTowers, word_tokenizer
from scenes.json_form import parse_mapping

log = logging.getLogger(__name__)

COMPONENTS = Path(__file__).parent / "components"
ENCODERS = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
TOWERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("autoencoder", "text")  # what can be opened alone
GATED = ("fuser", "position_net")  # what attention_type="gated" adds to a UNet


class StableDiffusion(Backbone):
    """A latent diffusion model with a KL autoencoder and CLIP text encoders.

    With a pooled caption vector (SDXL) captions are read from the last layer but one of each encoder, else from the last
    one; SD 2.x is published with its last layer cut off, so that both give what its training used. The autoencoder is kept
    in fp32 through every cast and outside autocast, because in half precision it overflows.

    Args:
        unet: the denoiser.
        vae: the autoencoder; brought to fp32.
        towers: text encoders with their tokenizers, in the order in which their features are concatenated.
        scheduler_config: config of a diffusers noise scheduler.
        resolution: side in pixels that the weights were trained at; by default the UNet's sample size.
        phrase_cache: tokens of phrases whose features are kept (`TextTowers`).
        size_ids: in place of each scene's own, in training and sampling alike; None for its own.

    Raises:
        ValueError: parts that do not belong together.
    """

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        towers: Sequence[TextTower],
        scheduler_config: Mapping[str, Any],
        resolution: int | None = None,
        phrase_cache: int = 0,
        size_ids: Sequence[float] | None = None,
    ) -> None:
        latent_channels = config_of(vae).latent_channels
        for side, allowed in (("out", [latent_channels]), ("in", [latent_channels, 2 * latent_channels + 1])):
            channels = config_of(unet)[f"{side}_channels"]
            if channels not in allowed:  # twice the latents and a mask: a UNet that was trained to inpaint
                raise ValueError(
                    f"unet.{side}_channels: {channels} is not the autoencoder's {latent_channels} latent channels; "
                    "take a text-to-image or inpainting UNet and the autoencoder that belongs to it"
                )
        latent_scale = 2 ** (len(config_of(vae).block_out_channels) - 1)
        pooled = config_of(unet).addition_embed_type == "text_time"
        super().__init__(
            unet=unet,
            text=TextTowers(
                towers,
                caption_layer="penultimate" if pooled else "last",
                caption_pooled=pooled,
                phrase_cache=phrase_cache,
            ),
            scheduler_config=dict(scheduler_config),
            latent_scale=latent_scale,
            resolution=resolution or config_of(unet).sample_size * latent_scale,
            size_ids=size_ids,
        )
        self.vae = vae.float()
        self.freeze()

    @classmethod
    @quiet_libraries()
    def from_folder(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        resolution: int | None = None,
        vae: str | Path | None = None,
        phrase_cache: int = 0,
        size_ids: Sequence[float] | None = None,
        only: str | None = None,
    ) -> StableDiffusion:
        """Opens published weights: a folder in diffusers' layout, or the name of a model on the hub.

        A UNet that was saved with GLIGEN's layers (`attention_type="gated"`) is opened without them: they are an adapter's.

        Args:
            path: folder or hub name.
            revision: commit, tag or branch on the hub.
            variant: suffix of the weight files ("fp16").
            dtype: "float32", "bfloat16" or "float16", of the denoiser and the text encoders.
            resolution: side in pixels that the weights were trained at; by default the UNet's sample size.
            vae: folder or hub name of another autoencoder.
            phrase_cache: tokens of phrases whose features are kept (`TextTowers`).
            size_ids: as in `Backbone`.
            only: "autoencoder" or "text": the weights of that part alone, for preparing data. The others are shapes on the meta
                device; of their weights nothing is read.

        Returns:
            The backbone on the CPU, frozen; its autoencoder is in float32 whatever the `dtype`.

        Raises:
            ValueError: nothing there, a part is missing, or a part lacks weights.
        """
        if dtype not in DTYPES:
            raise ValueError(f"backbone.dtype: {dtype!r} is unknown; take {', '.join(DTYPES)}")
        if only not in (None, *PARTS):
            raise ValueError(f"backbone.only: {only!r} is unknown; take {' or '.join(PARTS)}, or leave it out")
        where: dict[str, Any] = {"revision": revision}
        settings = {**where, "variant": variant}
        with _opening("path", path, "scheduler"):  # first: the smallest file
            scheduler_config: Any = DDPMScheduler.load_config(str(path), subfolder="scheduler", **where)
        cast = {**settings, "dtype": DTYPES[dtype]}
        if only is None:
            unet = _load(UNet2DConditionModel, path, "unet", allowed=GATED, attention_type="default", **cast)
        else:
            unet = _shape(UNet2DConditionModel, path, "unet", attention_type="default", **where)
        if only == "text":
            autoencoder = _shape(AutoencoderKL, path, "vae", **where)
        elif vae is None:
            autoencoder = _load(AutoencoderKL, path, "vae", dtype=torch.float32, **settings)
        else:
            autoencoder = _load(AutoencoderKL, vae, None, setting="vae", dtype=torch.float32)
        towers = []
        for encoder, tokenizer in TOWERS[: 2 if config_of(unet).addition_embed_type == "text_time" else 1]:
            with _opening("path", path, encoder):
                config = CLIPTextConfig.from_pretrained(str(path), subfolder=encoder, **where)
            if only == "autoencoder":
                with torch.device("meta"):
                    model: Any = _encoder_class(config)(config)
            else:
                model = _load(_encoder_class(config), path, encoder, allowed=("position_ids",), **cast)
            with _opening("path", path, tokenizer):
                towers.append(TextTower(CLIPTokenizer.from_pretrained(str(path), subfolder=tokenizer, **where), model))
        return cls(
            unet=unet,
            vae=autoencoder,
            towers=towers,
            scheduler_config=scheduler_config,
            resolution=resolution,
            phrase_cache=phrase_cache,
            size_ids=size_ids,
        )

    @classmethod
    @quiet_libraries()
    def from_configs(
        cls,
        components: str | Path,
        *,
        device: str = "meta",
        seed: int = 0,
        dtype: str = "float32",
        resolution: int | None = None,
        size_ids: Sequence[float] | None = None,
    ) -> StableDiffusion:
        """Builds the structure without weights, for plans and benchmarks.

        No vocabulary is part of the structure, so text is read as bytes, and only where the device holds values.

        Args:
            components: name of a folder in `components/`, or a folder of that layout.
            device: "meta" holds shapes only; any other device holds random weights.
            seed: seed of the random weights.
            dtype: "float32", "bfloat16" or "float16", of the denoiser and the text encoders.
            resolution: as in `from_folder`.
            size_ids: as in `Backbone`.

        Returns:
            The backbone on `device`, frozen, with text towers that read bytes.

        Raises:
            ValueError: no such components.
        """
        folder = COMPONENTS / components if isinstance(components, str) else components
        if not (folder / "unet" / "config.json").is_file():
            known = ", ".join(sorted(entry.name for entry in COMPONENTS.iterdir()))
            raise ValueError(f"backbone.components: {components} has no unet/config.json; take one of {known}")
        # Building draws from the global generator, which belongs to the caller.
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            bare = {**_read(folder / "unet" / "config.json"), "attention_type": "default"}
            unet: Any = UNet2DConditionModel.from_config(bare)
            vae: Any = AutoencoderKL.from_config(_read(folder / "vae" / "config.json"))
            encoders: list[Any] = []
            for name, _ in TOWERS:
                if (folder / name).is_dir():
                    config = CLIPTextConfig(**_read(folder / name / "config.json"))
                    encoder: Any = _encoder_class(config)(config)
                    encoders.append(encoder.to(DTYPES[dtype]))
        towers = [
            TextTower(word_tokenizer([], max_length=encoder.config.max_position_embeddings), encoder)
            for encoder in encoders
        ]
        return cls(
            unet=unet.to(DTYPES[dtype]),
            vae=vae,
            towers=towers,
            scheduler_config=_read(folder / "scheduler" / "scheduler_config.json"),
            resolution=resolution,
            size_ids=size_ids,
        )

    def _encode(self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        posterior = self._posterior(images)
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents.float() - self._shift) * self.latent_factor

    def _moments(self, images: Tensor) -> Tensor:
        posterior = self._posterior(images)
        mean = (posterior.mode().float() - self._shift) * self.latent_factor
        return torch.cat([mean, posterior.logvar.float() + 2 * math.log(self.latent_factor)], dim=1)

    def _posterior(self, images: Tensor) -> Any:
        """The autoencoder's distribution of unscaled latents; the autoencoder is in fp32 unless someone cast it by itself."""
        with _full_precision(images.device):
            encoded: Any = self.vae.encode(images.to(self.vae.dtype))
            return encoded.latent_dist

    @property
    def autoencoder(self) -> nn.Module:
        """The KL autoencoder."""
        return self.vae

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], clamped, fp32, of latents (B, C, h, w)."""
        with _full_precision(latents.device):
            scaled = latents.float() / config_of(self.vae).scaling_factor + self._shift
            decoded: Any = self.vae.decode(scaled)
            return decoded.sample.clamp(-1, 1)

    @property
    def latent_factor(self) -> float:
        """The autoencoder's scaling factor."""
        return config_of(self.vae).scaling_factor

    @property
    def _shift(self) -> float:
        return config_of(self.vae).shift_factor or 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StableDiffusion:
        """Applies `.to(…)` and its kin to all parts, but only the device to the autoencoder: it keeps fp32."""
        vae = self._modules.pop("vae", None)
        try:
            super()._apply(fn, recurse)
        finally:
            if vae is not None:
                self._modules["vae"] = vae
        if vae is not None:
            vae._apply(lambda value: _moved(value, fn))
        return self


def stable_diffusion(
    path: str | Path,
    *,
    components: str | Path,
    skeleton: bool = False,
    boxes: str | None = None,
    only: str | None = None,
    **settings: Any,
) -> StableDiffusion:
    """Opens weights, or with `skeleton` builds only the structure, on the meta device (`train.py plan=true`).

    Args:
        path: folder or hub name of the weights.
        components: name of the structure's folder in `components/`; a folder at `path` says its structure itself.
        skeleton: leave the weights away.
        boxes: published box weights for this model; not read here, experiments refer to it.
        only: as in `StableDiffusion.from_folder`.
        **settings: of `StableDiffusion.from_folder`.

    Returns:
        The backbone, frozen: with its weights, or on the meta device with `skeleton`.
    """
    if not skeleton:
        return StableDiffusion.from_folder(path, only=only, **settings)
    kept = {key: settings[key] for key in ("dtype", "resolution", "size_ids") if key in settings}
    own = Path(path)
    return StableDiffusion.from_configs(own if (own / "unet" / "config.json").is_file() else components, **kept)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which the meta device does not know."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _read(path: Path) -> dict[str, Any]:
    return parse_mapping(path.read_bytes(), str(path))


def _encoder_class(config: CLIPTextConfig) -> type[CLIPTextModel] | type[CLIPTextModelWithProjection]:
    name = (config.architectures or ["CLIPTextModel"])[0]
    if name not in ENCODERS:
        raise ValueError(f"text_encoder.architectures: {name} is not supported; take {' or '.join(ENCODERS)}")
    return ENCODERS[name]


def _moved(value: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor where `fn` would put it, in its own precision."""
    if value.is_meta:  # nothing to round, and only fn can bring it into being
        return fn(value).to(value.dtype)
    return value.to(fn(value.new_empty(0)).device)


@contextmanager
def _opening(setting: str, path: str | Path, part: str | None) -> Iterator[None]:
    """Turns what the libraries raise for a path that cannot be opened into one line that names the setting."""
    text = str(path)
    what = f"backbone.{setting}: {text}"
    if Path(text).is_dir():
        if part and not (Path(text) / part).is_dir():
            raise ValueError(f"{what} has no folder {part}; give a folder in diffusers' layout")
    elif text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"{what} is no folder here; give a folder in diffusers' layout or a name on the hub")
    try:
        with warnings.catch_warnings():  # diffusers 0.42 gives the hub's client an argument that it warns of
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
            yield
    except (OSError, HfHubHTTPError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        # the last three: a config that is no JSON, is no mapping, or is nested too deeply
        reason = " ".join(str(error).split())[:160]
        if Path(text).is_dir():
            fault, way = "lacks files in", "give a whole folder in diffusers' layout"
        else:
            fault, way = "is no folder here, and the hub gave no", "give a folder, or check the name and the network"
        raise ValueError(f"{what} {fault} {part or 'autoencoder'} ({reason}); {way}") from error


def _shape(model_class: Any, path: str | Path, part: str, *, revision: str | None, **changes: Any) -> Any:
    """One part without its weights, on the meta device; `changes` are to its config."""
    with _opening("path", path, part):
        config: Any = model_class.load_config(str(path), subfolder=part, revision=revision)
    with torch.device("meta"):
        return model_class.from_config({**config, **changes})


def _load(
    model_class: Any,
    path: str | Path,
    part: str | None,
    *,
    setting: str = "path",
    allowed: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """One part with every weight in its place; keys in the file with a name in `allowed` may be left over."""
    with _opening(setting, path, part), quiet_libraries():
        model, info = model_class.from_pretrained(str(path), subfolder=part or "", output_loading_info=True, **settings)
    left = [key for key in info["unexpected_keys"] if set(key.split(".")) & set(allowed)]
    spare = set(info["unexpected_keys"]) - set(left)
    if left:
        log.info("%s: %s: %d weights left out (%s)", path, part, len(left), ", ".join(allowed))
    faults = {
        "missing keys": sorted(info["missing_keys"]),
        "unexpected keys": sorted(spare),
        "other shapes": sorted(str(key) for key in info["mismatched_keys"]),
    }
    if any(faults.values()):
        named = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:4])})" for what, keys in faults.items() if keys)
        raise ValueError(f"backbone.{setting}: {path}: {part or 'autoencoder'}: {named}; take a whole set of weights")
    return model
