"""Weights of the regions method as its authors publish them: names, the folder of their script, checkpoints of their training.

The names are those of the published UNet (`position_net.*`, `<block>.fuser.*`), in its folder as in an adapter file. Adapter
files are read and written in `models.conditioning.adapter_file`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.conditioning.adapter_file import SUFFIX, load_pickled, read_tensors
from scenes.json_form import parse_json

if TYPE_CHECKING:
    from models.conditioning.regions.adapter import RegionsAdapter

VARIANTS = {"RegionalCrossAttention": "ca", "RegionalCrossAndSelfAttention": "casa"}
TOKEN_NET = "TextEmbeddingNetV2"
WRAPPED = ("state_dict", "module")  # where Lightning and DeepSpeed put the tensors


def published_tensors(adapter: RegionsAdapter) -> dict[str, Tensor]:
    """The adapter's tensors under the published names; they share memory with the adapter."""
    if adapter.variant == "union":
        return {name: parameter.data for name, parameter in adapter.named_parameters()}
    tensors = {f"position_net.{key}": tensor for key, tensor in adapter.position_net.state_dict().items()}
    for path, module in adapter.slot_modules().items():
        tensors |= {f"{path}.fuser.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors


def read_regional(path: str, *, variant: str) -> dict[str, Tensor]:
    """The regional tensors of published weights.

    Args:
        path: the folder that `init_regional_unet.py` has made or one that holds it as `unet`, a file of its tensors, or a
            checkpoint (`.pt`, `.ckpt`, `.pth`) of the published training; no code in it is run.
        variant: what the adapter is: "ca" or "casa".

    Returns:
        Tensors by published name, on the CPU, in the precision of the file.

    Raises:
        ValueError: nothing there, unreadable, another variant or another method's, or no regional weights in it.
    """
    what, where = f"conditioning.regions.weights: {path}", Path(path)
    if variant == "union":
        raise ValueError(
            f"{what} is no adapter file, and variant=union has no published weights; take variant=ca or casa"
        )
    if where.is_dir():
        tensors = _of_folder(where, what, variant)
    elif where.is_file():
        tensors = (
            read_tensors(where, what, wanted=_is_regional) if where.suffix == SUFFIX else _of_checkpoint(where, what)
        )
    else:
        raise ValueError(f"{what} does not exist; give an adapter file, a published folder or a checkpoint")
    if not tensors:
        raise ValueError(
            f"{what} holds no regional weights; give what init_regional_unet.py or its training has written"
        )
    found = "casa" if any(".fuser.self_attn." in key for key in tensors) else "ca"
    _check_variant(found, variant, what)
    return tensors


def _of_folder(folder: Path, what: str, variant: str) -> dict[str, Tensor]:
    """The tensors of a UNet's folder whose `config.json` names the published classes."""
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    file = folder / "config.json"
    try:
        config: dict[str, Any] = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: {file.name} is no JSON ({error}); fetch it again") from error
    names = {key: str(config.get(key, "")).rsplit(".", 1)[-1] for key in ("fuser_cls", "position_net_cls")}
    if names["fuser_cls"] not in VARIANTS or names["position_net_cls"] != TOKEN_NET:
        raise ValueError(
            f"{what}: config.json names fuser_cls={names['fuser_cls'] or None} and position_net_cls="
            f"{names['position_net_cls'] or None}; give a folder of init_regional_unet.py with {' or '.join(VARIANTS)} and "
            f"{TOKEN_NET}"
        )
    _check_variant(VARIANTS[names["fuser_cls"]], variant, what)
    for suffix in (SUFFIX, ".bin"):
        plain = re.compile(rf"diffusion_pytorch_model(-\d+-of-\d+)?{re.escape(suffix)}")
        if files := sorted(each for each in folder.iterdir() if plain.fullmatch(each.name)):
            return {
                key: value for each in files for key, value in read_tensors(each, what, wanted=_is_regional).items()
            }
    raise ValueError(f"{what} has no diffusion_pytorch_model file; give a folder that diffusers has written")


def _of_checkpoint(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors of the UNet in a checkpoint of the published training, or of the file that its script took out of one."""
    loaded = load_pickled(file, what)
    for name in WRAPPED:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict):
        raise ValueError(f"{what} holds no tensors by name; give a checkpoint of the published training")
    tensors = {}
    for key, tensor in loaded.items():
        name = str(key).removeprefix("_forward_module.").removeprefix("unet.")
        if isinstance(tensor, Tensor) and _is_regional(name):
            tensors[name.replace("null_positive_feature", "null_text_feature")] = tensor  # its name in old checkpoints
    return tensors


def _is_regional(key: str) -> bool:
    """Whether a UNet's tensor is the method's; the average (`ema_unet.`) of a checkpoint is not what its authors sample with."""
    return key.startswith("position_net.") or (".fuser." in key and not key.startswith("ema_unet."))


def _check_variant(found: str, variant: str, what: str) -> None:
    if found != variant:
        raise ValueError(
            f"{what} is of variant={found}, this adapter of {variant}; set conditioning.regions.variant={found}"
        )
