"""Weights of the boxes method: what an adapter starts from, and how they lie in a UNet with `attention_type="gated"`.

The names are those of diffusers' gated UNet (`position_net.*`, `<block>.fuser.*`), in a UNet's folder as in an adapter file.
Adapter files are read and written in `models.conditioning.adapter_file`, whole pipelines in `export`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from models.conditioning.adapter_file import load_weights, read_tensors
from models.conditioning.unet_files import unet_config, unet_files, unet_folder

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from models.conditioning.boxes.adapter import BoxesAdapter

INITS = ("published", "reset", "fresh")
GATES = ("alpha_attn", "alpha_dense")


def initialise(adapter: BoxesAdapter, *, backbone: Backbone, weights: str | None, init: str) -> None:
    """Starts an adapter from weights, in whole or in part.

    Args:
        adapter: a new adapter.
        backbone: what it was built for.
        weights: adapter file, gated UNet folder or file, or hub name; None for none.
        init: "published" takes everything; "reset" takes the gates and the null features, where there are weights, and
            leaves every other layer at random, which is what the published COCO run started from; "fresh" takes nothing.

    Raises:
        ValueError: an unknown `init`, "published" without weights, "fresh" with some, or weights that do not fit.
    """
    if init not in INITS:
        raise ValueError(f"conditioning.boxes.init: {init!r} is unknown; take {', '.join(INITS)}")
    if weights is None and init == "published":
        raise ValueError("conditioning.boxes.init: published needs conditioning.boxes.weights=FILE; or take fresh")
    if weights is not None and init == "fresh":
        raise ValueError(
            f"conditioning.boxes.weights: {weights} is not used by init=fresh; take init=published or reset"
        )
    if weights is not None:
        load_weights(adapter, weights, backbone=backbone, only=_is_plain_parameter if init == "reset" else None)


def _is_plain_parameter(key: str) -> bool:
    """Gates and null features: the published run re-initialised modules, and so passed these by."""
    return key.rsplit(".", 1)[-1].startswith(("alpha", "null"))


def published_tensors(adapter: BoxesAdapter) -> dict[str, Tensor]:
    """The adapter's parameters under the published names, gates as scalars; they share memory with the adapter."""
    tensors = {}
    for key, parameter in adapter.named_parameters():
        part, _, rest = key.partition(".")
        if part == "fusers":
            place, _, rest = rest.partition(".")
            tensor = parameter.data.view(()) if rest in GATES else parameter.data
            tensors[f"{adapter.paths[int(place)]}.fuser.{rest}"] = tensor
        else:
            tensors[key] = parameter.data
    return tensors


def read_gated(path: str) -> dict[str, Tensor]:
    """The box tensors of a gated UNet: its file, its folder, a pipeline folder with one, or a name on the hub.

    Args:
        path: what to read.

    Returns:
        Tensors by published name, on the CPU, in the precision of the file.

    Raises:
        ValueError: nothing there, unreadable, or no box weights in it.
    """
    what, tensors = f"conditioning.boxes.weights: {path}", {}
    for file in _files(path, what):
        tensors |= read_tensors(file, what, wanted=_is_gated)
    if not tensors:
        raise ValueError(f'{what} holds no box weights; give a UNet with attention_type="gated", or an adapter file')
    return tensors


def _is_gated(key: str) -> bool:
    return key.startswith("position_net.") or ".fuser." in key


def _files(path: str, what: str) -> list[Path]:
    """The weight files at a path or hub name."""
    if Path(path).is_file():
        return [Path(path)]
    folder = unet_folder(path, what)
    kind = unet_config(folder, what).get("attention_type", "gated")
    if kind != "gated":
        raise ValueError(f"{what} has attention_type={kind!r}; give a UNet with gated")
    return unet_files(folder, what)
