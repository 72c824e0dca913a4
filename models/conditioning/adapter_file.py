"""Adapter files: the weights of one adapter under the names that its method publishes, with what they belong to.

One reader and one writer for every method. A file is safetensors; its metadata says method, settings and backbone, so that
another method's file, or one for another backbone, is refused by name. What a method knows of files that others publish
lives with the method (`Adapter.read_published`, `Adapter.export`).
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scenes.json_form import parse_mapping

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from models.conditioning.base import Adapter

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that fit an adapter.

    Attributes:
        tensors: by published name, on the CPU, in the precision of the file.
        settings: the adapter's settings as the file has them; empty for files of others, which say none.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


def save_adapter(adapter: Adapter, path: str | Path, *, backbone: Backbone) -> None:
    """Writes an adapter file, whole or not at all.

    Args:
        adapter: what to write.
        path: a `.safetensors` file; its folder is made.
        backbone: what the adapter belongs to; its structure is enough.
    """
    path = Path(path)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.published().items()}
    about = {
        "format": "pt",
        "method": adapter.method,
        "settings": json.dumps(adapter.settings()),
        "backbone": json.dumps(belongs_to(backbone)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, str(draft), metadata=about)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_weights(
    adapter: Adapter, path: str | Path, *, backbone: Backbone, only: Callable[[str], bool] | None = None
) -> None:
    """Reads weights into an adapter; warns where the file was made with other settings that leave the shapes alone.

    Args:
        adapter: what to fill.
        path: an adapter file, or what the adapter's method can read beside it.
        backbone: what the adapter was built for.
        only: which of the published names to take; None takes all.

    Raises:
        ValueError: weights that do not fit, as in `read_weights`.
    """
    weights = read_weights(adapter, path, backbone=backbone)
    if differing := differing_settings(adapter, weights):
        warnings.warn(f"{differing}; set it as there, unless the change is meant", stacklevel=2)
    fill(adapter, {key: tensor for key, tensor in weights.tensors.items() if only is None or only(key)})


def read_weights(adapter: Adapter, path: str | Path, *, backbone: Backbone) -> Weights:
    """Reads weights and compares them with an adapter, strictly.

    Args:
        adapter: what they are for; not changed.
        path: an adapter file, or what the adapter's method can read beside it.
        backbone: what the adapter was built for.

    Returns:
        Tensors under exactly the adapter's published names, in its shapes.

    Raises:
        ValueError: nothing there, unreadable, of another method or backbone, made with settings that give other shapes, or
            with keys that are missing or unexpected.
    """
    what = f"conditioning.{adapter.method}.weights: {path}"
    about = _metadata(Path(path), what)
    if "method" not in about:
        tensors, settings = adapter.read_published(str(path)), {}
    else:
        _check_belonging(about, adapter, backbone, what)
        tensors = read_tensors(Path(path), what)
        settings = parse_mapping(about.get("settings", "{}"), f"{what}: its settings")
    weights = Weights(tensors=tensors, settings=settings)
    try:
        audit(tensors, adapter.published(), what=what)
    except ValueError as error:
        if differing := differing_settings(adapter, weights):
            raise ValueError(f"{differing}, and does not fit ({path}); set it as there") from error
        raise
    return weights


def differing_settings(adapter: Adapter, weights: Weights) -> str:
    """The settings that the weights were made with and the adapter has not, in words; empty where there are none."""
    own = json.loads(json.dumps(adapter.settings()))
    differing = [name for name in own if name in weights.settings and weights.settings[name] != own[name]]
    return "; ".join(
        f"conditioning.{adapter.method}.{name}: {own[name]} here, but the weights were made with {weights.settings[name]}"
        for name in differing
    )


@torch.no_grad()
def fill(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the adapter's parameters of these published names."""
    own = adapter.published()
    for key, tensor in tensors.items():
        own[key].copy_(tensor)


def audit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str) -> None:
    """Compares names and shapes, strictly.

    Args:
        found: tensors by published name.
        expected: those that belong there.
        what: the setting and the file, for the message.

    Raises:
        ValueError: keys that are missing or unexpected (all are named), or another shape.
    """
    shapes = [
        f"{key} {tuple(found[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    if shapes:
        raise ValueError(
            f"{what} belongs to another backbone: {len(shapes)} shapes differ ({', '.join(shapes[:3])}); "
            "give weights of this backbone, or choose theirs with backbone=NAME"
        )
    faults = {"misses": sorted(set(expected) - set(found)), "has unexpected": sorted(set(found) - set(expected))}
    if any(faults.values()):
        named = "; ".join(f"{kind} {len(keys)} keys: {', '.join(keys)}" for kind, keys in faults.items() if keys)
        raise ValueError(f"{what} {named}; give whole weights of this method, backbone and choice of blocks")


def belongs_to(backbone: Backbone) -> dict[str, int]:
    """What an adapter's file says of the backbone: enough to refuse another one before its tensors are read."""
    return {"text_width": backbone.text_width, "latent_channels": backbone.latent_channels}


def read_tensors(file: Path, what: str, *, wanted: Callable[[str], bool] = bool) -> dict[str, Tensor]:
    """The tensors of one weight file; no code in it is run.

    Args:
        file: `.safetensors`, or what `torch.save` has written.
        what: the setting and the file, for the message.
        wanted: which names to take; all by default.

    Returns:
        Tensors by the names in the file, on the CPU.

    Raises:
        ValueError: a file that cannot be read, or that holds more than tensors by name.
    """
    if file.suffix == SUFFIX:
        try:
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys() if wanted(key)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{what}: {file.name} cannot be read ({error}); fetch it again") from error
    loaded = load_pickled(file, what)
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{what}: {file.name} holds other things than tensors by name; give a file of weights alone")
    return {key: tensor for key, tensor in loaded.items() if wanted(key)}


def load_pickled(file: Path, what: str) -> Any:
    """What `torch.save` has written; no code in it is run.

    Args:
        file: the file.
        what: the setting and the file, for the message.

    Returns:
        Its content, tensors on the CPU.

    Raises:
        ValueError: it is no such file, or holds more than tensors and plain values.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, among them those of pickles that it refuses
        wanted = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
        kind = f"it asks for {wanted[1]}" if wanted else "it is cut, or torch.save did not write it"
        raise ValueError(
            f"{what}: {file.name} cannot be read ({kind}); fetch it again, or save its tensors as safetensors"
        ) from error


def _metadata(file: Path, what: str) -> dict[str, str]:
    """What a safetensors file says of itself; empty for anything else."""
    if file.suffix != SUFFIX or not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what}: {file.name} cannot be read ({error}); fetch it again") from error


def _check_belonging(about: Mapping[str, str], adapter: Adapter, backbone: Backbone, what: str) -> None:
    if about["method"] != adapter.method:
        raise ValueError(
            f"{what} holds weights of the method {about['method']}; give weights of {adapter.method}, or take "
            f"conditioning={about['method']}"
        )
    own = belongs_to(backbone)
    for name, value in parse_mapping(about.get("backbone", "{}"), f"{what}: its backbone").items():
        if name in own and value != own[name]:
            raise ValueError(
                f"{what} belongs to another backbone: its {name} is {value}, this one's {own[name]}; give weights of this "
                "backbone, or choose theirs with backbone=NAME"
            )
