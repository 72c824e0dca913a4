"""Files of box weights: read, audited against an adapter, written.

A file of box weights holds the tensors under the names of diffusers' gated UNet (`position_net.*`, `<block>.fuser.*`),
whether it is a UNet's folder or an adapter file of this project; the adapter file has the adapter's settings in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.conditioning.boxes.adapter import BoxesAdapter

INITS = ("published", "reset", "fresh")
METHOD = "boxes"


def initialise(adapter: BoxesAdapter, *, weights: str | None, init: str) -> None:
    """Starts an adapter from weights, in whole or in part.

    Args:
        adapter: a new adapter.
        weights: adapter file, gated UNet folder or hub name; None for none.
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
    if weights is None:
        return
    tensors = read_weights(weights)
    audit(tensors, published_tensors(adapter), origin=weights)
    if init == "reset":  # plain parameters: the published run re-initialised modules, and so passed them by
        tensors = {
            key: tensor for key, tensor in tensors.items() if key.rsplit(".", 1)[-1].startswith(("alpha", "null"))
        }
    own = published_tensors(adapter)
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)


def published_tensors(adapter: nn.Module) -> dict[str, Tensor]:
    """The adapter's own parameters under the published names; they share memory with the adapter."""
    paths: list[str] = adapter.paths  # type: ignore[assignment]
    tensors = {}
    for key, parameter in adapter.named_parameters():
        part, _, rest = key.partition(".")
        if part == "fusers":
            place, _, rest = rest.partition(".")
            tensors[f"{paths[int(place)]}.fuser.{rest}"] = parameter.data
        else:
            tensors[key] = parameter.data
    return tensors


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The box tensors of an adapter file, a gated UNet folder (or a pipeline folder with one), or a name on the hub.

    Args:
        path: what to read.

    Returns:
        Tensors by published name, on the CPU, in the precision of the file.

    Raises:
        ValueError: nothing there, unreadable, or no box weights in it.
    """
    what, tensors = f"conditioning.boxes.weights: {path}", {}
    for file in _files(str(path), what):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    tensors |= {key: opened.get_tensor(key) for key in opened.keys() if _is_gated(key)}  # noqa: SIM118
            else:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                tensors |= {key: tensor for key, tensor in loaded.items() if _is_gated(key)}
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise ValueError(f"{what}: {file.name} cannot be read ({error}); fetch it again") from error
    if not tensors:
        raise ValueError(f'{what} holds no box weights; give a UNet with attention_type="gated", or an adapter file')
    return tensors


def audit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, origin: str | Path) -> None:
    """Compares names and shapes, strictly.

    Args:
        found: tensors by published name.
        expected: those that belong there.
        origin: where they were found, for the message.

    Raises:
        ValueError: keys that are missing or unexpected (all are named), or another shape.
    """
    what = f"conditioning.boxes.weights: {origin}"
    faults = {"misses": sorted(set(expected) - set(found)), "has unexpected": sorted(set(found) - set(expected))}
    shared = [key for key in expected if key in found]
    shapes = [
        f"{k} {tuple(found[k].shape)} for {tuple(expected[k].shape)}"
        for k in shared
        if found[k].shape != expected[k].shape
    ]
    if shapes:
        raise ValueError(
            f"{what} belongs to another backbone: {len(shapes)} shapes differ ({', '.join(shapes[:3])}); "
            "give weights for this backbone"
        )
    if any(faults.values()):
        named = "; ".join(f"{kind} {len(keys)} keys: {', '.join(keys)}" for kind, keys in faults.items() if keys)
        raise ValueError(
            f"{what} {named}; give weights of the same backbone and set conditioning.boxes.blocks as there"
        )


def save_adapter(adapter: BoxesAdapter, path: str | Path) -> None:
    """Writes an adapter file: the tensors under their published names, the settings in the metadata.

    Args:
        adapter: what to write.
        path: a `.safetensors` file; its folder is made.
    """
    settings = {"slots": adapter.slots, "mask": adapter.mask, "text_width": adapter.position_net.phrase_width}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in published_tensors(adapter).items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata={"method": METHOD, "settings": json.dumps(settings)})


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
        json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    )
    if config.get("attention_type", "gated") != "gated":
        raise ValueError(f"{what} has attention_type={config['attention_type']!r}; give a UNet with gated")
    for pattern in ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            plain = [file for file in files if ".fp16." not in file.name]  # a second precision of the same tensors
            return plain or files
    raise ValueError(f"{what} has no diffusion_pytorch_model file; give a folder that diffusers has written")
