"""Tiny Stable Diffusion models at random weights, for tests: the published structure, block for block, only narrow.

They are written as a folder in diffusers' layout and opened by the loader of the real ones, so that a test on them runs
the real code. Widths differ on every axis, so that no two can be mixed up unnoticed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from files.quiet import quiet_libraries
from models.backbones.stable_diffusion import COMPONENTS, TOWERS, StableDiffusion, _encoder_class, _read
from models.text import word_tokenizer

WORDS = """
    a an and the of on in with to at is by left right above below under behind inside man woman child person dog
    cat bird horse car bus tree house table chair cup plate ball hat shirt street grass sky water red green blue
    yellow purple orange cyan pink white black brown large small circle square triangle diamond plain striped
    checked
""".split()

UNET = {
    "sd15": {"block_out_channels": [16, 32, 32, 48], "attention_head_dim": 2, "cross_attention_dim": 24},
    "sd21": {"block_out_channels": [16, 32, 48, 48], "attention_head_dim": [2, 4, 6, 6], "cross_attention_dim": 32},
    "sd21_base": {
        "block_out_channels": [16, 32, 48, 48],
        "attention_head_dim": [2, 4, 6, 6],
        "cross_attention_dim": 32,
    },
    "sdxl": {
        "block_out_channels": [16, 32, 48],
        "attention_head_dim": [2, 4, 6],
        "cross_attention_dim": 64,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
    },
}
TEXT = {
    "sd15": [{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}],
    "sd21": [{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}],
    "sd21_base": [{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}],
    "sdxl": [
        {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
        {"hidden_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 40},
    ],
}
PADDING = {  # as published
    "sd15": ("<|endoftext|>",),
    "sd21": ("!",),
    "sd21_base": ("!",),
    "sdxl": ("<|endoftext|>", "!"),
}


@quiet_libraries()
def make_tiny(kind: str, folder: str | Path, *, seed: int = 0) -> None:
    """Writes a tiny model in diffusers' layout.

    Args:
        kind: "sd15", "sd21", "sd21_base" or "sdxl".
        folder: where to; made if it is not there.
        seed: of the weights.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in UNET:
        raise ValueError(f"backbone.kind: {kind!r} is unknown; take {', '.join(UNET)}")
    folder, published = Path(folder), COMPONENTS / kind
    narrow: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    vae_narrow = {"block_out_channels": [8, 8, 12, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet_config = {**_read(published / "unet" / "config.json"), **narrow, **UNET[kind]}
        unet: Any = UNet2DConditionModel.from_config(unet_config)
        unet.save_pretrained(folder / "unet")
        vae_config = {**_read(published / "vae" / "config.json"), **vae_narrow}
        vae: Any = AutoencoderKL.from_config(vae_config)
        vae.save_pretrained(folder / "vae")
        for (encoder, tokenizer), widths, padding in zip(TOWERS, TEXT[kind], PADDING[kind], strict=False):
            words = word_tokenizer(WORDS, max_length=77)
            words.pad_token = padding
            words.save_pretrained(folder / tokenizer)
            config = CLIPTextConfig(
                **{
                    **_read(published / encoder / "config.json"),
                    **widths,
                    "intermediate_size": 2 * widths["hidden_size"],
                    "vocab_size": len(words),
                }
            )
            _encoder_class(config)(config).save_pretrained(folder / encoder)
    (folder / "scheduler").mkdir(exist_ok=True)
    schedule = (published / "scheduler" / "scheduler_config.json").read_bytes()
    (folder / "scheduler" / "scheduler_config.json").write_bytes(schedule)


def tiny_backbone(
    kind: str,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    dtype: str = "float32",
    resolution: int | None = None,
    size_ids: Sequence[float] | None = None,
    only: str | None = None,
) -> StableDiffusion:
    """A tiny model, opened by the real loader.

    Args:
        kind: "sd15", "sd21", "sd21_base" or "sdxl".
        folder: opened if it is there, else made; None takes a temporary one that is removed at once.
        seed: of the weights, where they are made.
        dtype: as in `StableDiffusion.from_folder`.
        resolution: side in pixels to work at; by default 64.
        size_ids: as in `Backbone`.
        only: as in `StableDiffusion.from_folder`.

    Returns:
        The backbone with random weights, frozen, on the CPU.
    """
    settings: dict[str, Any] = {"dtype": dtype, "resolution": resolution, "size_ids": size_ids, "only": only}
    if folder is not None:
        if not Path(folder).exists():
            make_tiny(kind, folder, seed=seed)
        return StableDiffusion.from_folder(folder, **settings)
    with tempfile.TemporaryDirectory(prefix="tiny_") as temporary:
        make_tiny(kind, temporary, seed=seed)
        return StableDiffusion.from_folder(temporary, **settings)
