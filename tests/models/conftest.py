"""Tiny models with GLIGEN's layers, in the form in which they are published: a folder whose UNet has them inside."""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from models.backbones.stable_diffusion import StableDiffusion
from models.backbones.tiny import make_tiny


@pytest.fixture(scope="session")
def published_boxes(tmp_path_factory):
    """published_boxes(kind, channels): `folder`, its gated `unet` with random gates, and the `backbone` opened from it."""

    @functools.cache
    def make(kind, channels=4):
        folder = tmp_path_factory.mktemp(f"gated_{kind}_{channels}")
        make_tiny(kind, folder)
        plain = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            changes = {"attention_type": "gated", "in_channels": channels}
            gated = UNet2DConditionModel.from_config({**plain.config, **changes})
            gates = [gate for name, gate in gated.named_parameters() if "alpha" in name or "null" in name]
            for gate in gates:
                torch.nn.init.normal_(gate)
        gated.save_pretrained(folder / "unet")
        return SimpleNamespace(folder=folder, unet=gated.eval(), backbone=StableDiffusion.from_folder(folder))

    return make
