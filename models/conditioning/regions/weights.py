"""Weights of the regions method as its authors publish them: names, the folder of their script, checkpoints of their training.

The names are those of the published UNet (`position_net.*`, `<block>.fuser.*`), in its folder as in an adapter file. Adapter
files are read and written in `models.conditioning.adapter_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from models.conditioning.adapter_file import SUFFIX, read_tensors
from models.conditioning.unet_files import unet_config, unet_files, unet_folder, unet_of_checkpoint

if TYPE_CHECKING:
    from models.conditioning.regions.adapter import RegionsAdapter

VARIANTS = {"RegionalCrossAttention": "ca", "RegionalCrossAndSelfAttention": "casa"}
TOKEN_NET = "TextEmbeddingNetV2"
BASE = ".base_layer."  # where peft, in a run with LoRA, puts the layer that it has wrapped


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
        path: the folder that `init_regional_unet.py` has made or one that holds it as `unet`, the name of either on the hub,
            a file of its tensors, or a checkpoint (`.pt`, `.ckpt`, `.pth`) of the published training; no code in it is run.
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
    if not where.is_file():
        tensors = _of_folder(path, what, variant)
    elif where.suffix == SUFFIX:
        tensors = read_tensors(where, what, wanted=_is_regional)
    else:
        tensors = _of_checkpoint(where, what)
    if not tensors:
        raise ValueError(
            f"{what} holds no regional weights; give what init_regional_unet.py or its training has written"
        )
    found = "casa" if any(".fuser.self_attn." in key for key in tensors) else "ca"
    _check_variant(found, variant, what)
    return tensors


def _of_folder(path: str, what: str, variant: str) -> dict[str, Tensor]:
    """The tensors of a UNet's folder, here or on the hub, whose `config.json` names the published classes."""
    folder = unet_folder(path, what)
    config = unet_config(folder, what)
    names = {key: str(config.get(key, "")).rsplit(".", 1)[-1] for key in ("fuser_cls", "position_net_cls")}
    if names["fuser_cls"] not in VARIANTS or names["position_net_cls"] != TOKEN_NET:
        raise ValueError(
            f"{what}: config.json names fuser_cls={names['fuser_cls'] or None} and position_net_cls="
            f"{names['position_net_cls'] or None}; give a folder of init_regional_unet.py with {' or '.join(VARIANTS)} and "
            f"{TOKEN_NET}"
        )
    _check_variant(VARIANTS[names["fuser_cls"]], variant, what)
    files = unet_files(folder, what)
    return {key: value for each in files for key, value in read_tensors(each, what, wanted=_is_regional).items()}


def _of_checkpoint(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors in a checkpoint of the published training, or in the file that its script took out of one."""
    tensors = {}
    for key, tensor in unet_of_checkpoint(file, what).items():
        name = key.replace(BASE, ".")
        if _is_regional(name) and ".lora_" not in name:  # those are conditioning.lora's
            tensors[name.replace("null_positive_feature", "null_text_feature")] = tensor  # its name in old checkpoints
    return tensors


def _is_regional(key: str) -> bool:
    """Whether a UNet's tensor is the method's; the average (`ema_…`) of a checkpoint is not what its authors sample with."""
    return key.startswith("position_net.") or (".fuser." in key and not key.startswith("ema_"))


def _check_variant(found: str, variant: str, what: str) -> None:
    if found != variant:
        raise ValueError(
            f"{what} is of variant={found}, this adapter of {variant}; set conditioning.regions.variant={found}"
        )
