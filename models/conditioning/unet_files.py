"""A published UNet's weight files: in a folder of diffusers' layout that is here, on the hub under a name, in a checkpoint.

What is in the files, and which of it is an adapter's, the methods know.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from models.conditioning.adapter_file import load_pickled
from scenes.json_form import parse_mapping

FETCHED = ("unet/*", "*.json", "diffusion_pytorch_model*")  # of a model on the hub
CHECKPOINTS = (".pt", ".pth", ".ckpt")
OF_FILES = (".safetensors", ".bin", *CHECKPOINTS)  # endings that no name on the hub has
WRAPPED = ("state_dict", "module")  # where Lightning and DeepSpeed put the tensors


def unet_folder(path: str, what: str) -> Path:
    """The folder of a UNet: one that is here, or fetched by its name on the hub; of a whole pipeline its part `unet`.

    Args:
        path: folder, or hub name.
        what: the setting and the path, for the message.

    Returns:
        The folder.

    Raises:
        ValueError: no such folder, and no hub name or nothing that the hub or its cache on this machine gives.
    """
    where = Path(path)
    if not where.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/", "~")) or path.endswith(OF_FILES):
            raise ValueError(
                f"{what} is no file or folder here; give an adapter file, a UNet folder or a name on the hub"
            )
        try:
            where = Path(snapshot_download(path, allow_patterns=list(FETCHED)))
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{what} is no file here, and the hub gave none ({reason}); check name and network, or fetch it elsewhere "
                f"(hf download {path} --local-dir DIR) and give DIR"
            ) from error
    return where / "unet" if (where / "unet").is_dir() else where


def unet_config(folder: Path, what: str) -> dict[str, Any]:
    """What the `config.json` of a UNet's folder says; empty where there is none.

    Args:
        folder: as `unet_folder` gives it.
        what: the setting and the path, for the message.

    Returns:
        The configuration.

    Raises:
        ValueError: it is no JSON.
    """
    file = folder / "config.json"
    return parse_mapping(file.read_bytes(), f"{what}: {file.name}") if file.is_file() else {}


def unet_files(folder: Path, what: str) -> list[Path]:
    """The weight files of a UNet's folder: safetensors before torch's, full precision before half; whole or in parts.

    Args:
        folder: as `unet_folder` gives it.
        what: the setting and the path, for the message.

    Returns:
        The files, all of one kind.

    Raises:
        ValueError: there is none.
    """
    files = sorted(folder.glob("diffusion_pytorch_model*"))
    for suffix in (".safetensors", ".bin"):
        for variant in ("", r"\.fp16"):
            name = re.compile(rf"diffusion_pytorch_model{variant}(-\d+-of-\d+)?{re.escape(suffix)}")
            if found := [file for file in files if name.fullmatch(file.name)]:
                return found
    raise ValueError(f"{what} has no diffusion_pytorch_model file; give a folder that diffusers has written")


def unet_of_checkpoint(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors of the UNet in a checkpoint of a published training; no code in it is run.

    Args:
        file: what `torch.save` has written: tensors by name, or a checkpoint of Lightning or DeepSpeed.
        what: the setting and the path, for the message.

    Returns:
        Tensors by their names in the UNet, on the CPU; what belongs elsewhere keeps its whole name.

    Raises:
        ValueError: it cannot be read, or holds no tensors by name.
    """
    loaded = load_pickled(file, what)
    for name in WRAPPED:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict):
        raise ValueError(f"{what} holds no tensors by name; give a checkpoint of the published training")
    return {
        str(key).removeprefix("_forward_module.").removeprefix("unet."): tensor
        for key, tensor in loaded.items()
        if isinstance(tensor, Tensor)
    }
