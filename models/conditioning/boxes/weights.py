"""Weights of the boxes method: what an adapter starts from, and how they lie in a UNet with `attention_type="gated"`.

The names are those of diffusers' gated UNet (`position_net.*`, `<block>.fuser.*`), in a UNet's folder as in an adapter file.
Adapter files are read and written in `models.conditioning.adapter_file`, whole pipelines in `export`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from models.conditioning.adapter_file import load_weights, read_tensors
from scenes.json_form import parse_json

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from models.conditioning.boxes.adapter import BoxesAdapter

INITS = ("published", "reset", "fresh")
PLAIN = r"diffusion_pytorch_model(-\d+-of-\d+)?"  # whole or in parts; other names are the same tensors again, as .fp16
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
    where = Path(path)
    if where.is_file():
        return [where]
    if not where.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ValueError(
                f"{what} is no file or folder here; give an adapter file, a UNet folder or a name on the hub"
            )
        try:
            where = Path(snapshot_download(path, allow_patterns=["unet/*", "*.json", "diffusion_pytorch_model*"]))
        except (OSError, HfHubHTTPError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{what} is no file here, and the hub gave none ({reason}); check name and network"
            ) from error
    folder = where / "unet" if (where / "unet").is_dir() else where
    config: dict[str, Any] = (
        parse_json((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    )
    if config.get("attention_type", "gated") != "gated":
        raise ValueError(f"{what} has attention_type={config['attention_type']!r}; give a UNet with gated")
    files = sorted(folder.glob("diffusion_pytorch_model*"))
    for suffix in (".safetensors", ".bin"):
        for name in (PLAIN, r"diffusion_pytorch_model\.fp16(-\d+-of-\d+)?"):
            if found := [file for file in files if re.fullmatch(name + re.escape(suffix), file.name)]:
                return found
    raise ValueError(f"{what} has no diffusion_pytorch_model file; give a folder that diffusers has written")
