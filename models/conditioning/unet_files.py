"""Where a published UNet's weight files are: in a folder of diffusers' layout that is here, or on the hub under a name.

What is in the files, and which of it is an adapter's, the methods know.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

FETCHED = ("unet/*", "*.json", "diffusion_pytorch_model*")  # of a model on the hub
OF_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # endings that no name on the hub has


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
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: {file.name} is no JSON ({error}); fetch it again") from error


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
