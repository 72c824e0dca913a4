"""Stages of preparation that run a backbone: what `conf/stage/*.yaml` names, from their nodes to objects.

The stages themselves know nothing of Hydra; they are given something to call for their backbone.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from hydra.utils import get_method, instantiate

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from preparation.latents import Latents


def latents(
    *,
    backbone: dict[str, Any] | None,
    transform: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    **settings: Any,
) -> Latents:
    """Make the stage `latents` over the backbone that the command line chose.

    Args:
        backbone: its node.
        transform: of `preparation.latents.ImageTransform`.
        output: of `preparation.latents.LatentOutput`.
        **settings: of `preparation.latents.Latents`.

    Returns:
        The stage; the backbone is opened when it is needed.
    """
    from preparation.latents import ImageTransform, LatentOutput, Latents

    node = _chosen(backbone, "latents")
    return Latents(
        functools.partial(open_part, node, "autoencoder"),
        model={key: value for key, value in node.items() if key != "_convert_"},
        transform=ImageTransform(**transform or {}),
        output=LatentOutput(**output or {}),
        **settings,
    )


def open_part(node: dict[str, Any], part: str) -> Backbone:
    """Open a backbone of whose weights, where its class can, only a part is read."""
    takes = inspect.signature(get_method(node["_target_"])).parameters
    return instantiate(node, _convert_="all", **({"only": part} if "only" in takes else {}))


def _chosen(backbone: dict[str, Any] | None, stage: str) -> dict[str, Any]:
    """Return the node of a backbone; reject a command that chose none."""
    if backbone is None:
        raise ValueError(f"backbone: task={stage} runs a part of one; name it, such as backbone=sdxl")
    return backbone
