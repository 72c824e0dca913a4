"""A boxes adapter as a whole pipeline folder in diffusers' layout, to be used without this project.

The UNet is saved with `attention_type="gated"`, the other parts as they are; `boxes_pipeline.py` is copied beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import UNet2DConditionModel

from models.backbones.base import Backbone, config_of
from models.backbones.stable_diffusion import TOWERS, StableDiffusion
from models.conditioning.boxes import boxes_pipeline
from models.conditioning.boxes.boxes_pipeline import BoxesPipeline
from scenes.json_form import parse_json

if TYPE_CHECKING:
    from models.conditioning.boxes.adapter import BoxesAdapter


def export_pipeline(adapter: BoxesAdapter, backbone: Backbone, out: str | Path) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)` opens, whole or not at all.

    Args:
        adapter: as published: no mask, every block.
        backbone: a Stable Diffusion model with weights.
        out: the folder; not there yet, or empty.

    Raises:
        ValueError: a folder that holds something, an adapter that diffusers has no layers for, or another backbone.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out={out}: is there already; name a new folder")
    for setting, value, published in (("mask", adapter.mask, "none"), ("blocks", adapter.blocks, "all")):
        if value != published:
            raise ValueError(
                f"conditioning.boxes.{setting}: {value}, but diffusers' gated UNet knows only {published}; take form=adapter"
            )
    if not isinstance(backbone, StableDiffusion) or backbone.unet.device.type == "meta":
        raise ValueError(
            f"backbone: form=diffusers writes a Stable Diffusion model with its weights, not {type(backbone).__name__} "
            f"{'without them' if isinstance(backbone, StableDiffusion) else ''}; take form=adapter, or another backbone"
        )
    towers: dict[str, Any] = {}
    for (encoder, tokenizer), tower in zip(TOWERS, backbone.text.each, strict=False):
        towers |= {encoder: tower.encoder, tokenizer: tower.tokenizer}
    schedule = backbone.scheduler_config
    scheduler = getattr(diffusers, schedule.get("_class_name", "DDIMScheduler")).from_config(schedule)
    pipeline = BoxesPipeline(
        vae=backbone.vae,
        unet=gated_unet(backbone.unet, adapter),
        scheduler=scheduler,
        gligen_slots=adapter.slots,
        **towers,
    )
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        pipeline.save_pretrained(draft)
        _name_pipeline(draft)
        if out.is_dir():
            out.rmdir()
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def gated_unet(unet: UNet2DConditionModel, adapter: BoxesAdapter) -> UNet2DConditionModel:
    """A UNet of diffusers' own with the adapter's layers inside; it shares every tensor with the two.

    Args:
        unet: the bare UNet.
        adapter: a boxes adapter for every block of it.

    Returns:
        A UNet with `attention_type="gated"`.
    """
    config = {key: value for key, value in config_of(unet).items() if not key.startswith("_")}
    with torch.device("meta"):
        gated: Any = UNet2DConditionModel.from_config({**config, "attention_type": "gated"})
    gated.load_state_dict({**unet.state_dict(), **adapter.published()}, strict=True, assign=True)
    return gated


def _name_pipeline(folder: Path) -> None:
    """Puts the pipeline's file into the folder and its name into the index."""
    source = Path(boxes_pipeline.__file__)
    shutil.copyfile(source, folder / source.name)
    index = folder / "model_index.json"
    content = parse_json(index.read_text(encoding="utf-8"))
    content["_class_name"] = [source.stem, BoxesPipeline.__name__]
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
