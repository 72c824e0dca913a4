"""Checkpoints of the published scene-graph training, read and written: `baseline3_100.pt` and its kin.

Such a file holds a dict whose `state_dict` has the encoder's tensors; adapter files are read and written in
`models.conditioning.adapter_file`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from files.atomic import replacing
from models.conditioning.adapter_file import load_pickled

TENSORS = "state_dict"
WRAPPED = "module."  # what distributed training may put before every name


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """The encoder's tensors; no code in the file is run.

    Args:
        path: a checkpoint of the published training (`.pt`).

    Returns:
        Tensors by published name, on the CPU, in the precision of the file.

    Raises:
        ValueError: nothing there, unreadable, or no tensors by name under `state_dict`.
    """
    what, file = f"conditioning.scene_graph.weights: {path}", Path(path)
    if not file.is_file():
        raise ValueError(f"{what} is no file; give an adapter file, or a checkpoint of the published training")
    loaded = load_pickled(file, what)
    tensors = loaded.get(TENSORS) if isinstance(loaded, dict) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{what} holds no tensors under {TENSORS}; give a checkpoint of the published training")
    return {str(name).removeprefix(WRAPPED): tensor for name, tensor in tensors.items()}


def write_checkpoint(tensors: Mapping[str, Tensor], out: Path) -> None:
    """Writes tensors in the published form, whole or not at all.

    Args:
        tensors: by published name.
        out: the file; its folder is made.
    """
    kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with replacing(out, sync=False) as file:
        torch.save({"epoch": 0, "iteration": 0, "name": "scenograph", TENSORS: kept}, file)
